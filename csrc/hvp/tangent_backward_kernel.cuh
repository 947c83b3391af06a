// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of tangent_backward: one pass, as tangent_forward's, with sums over rows in registers.
#pragma once

#include <cstdint>

#include "hvp/tile.cuh"

namespace curvlab::hvp {

constexpr int kBackwardBlocksPerMultiprocessor = 2;

template <class acc_t, int width>
struct BackwardChannels {
  acc_t scale[width], inv_std[width], gain[width], bias_sum[width], gain_sum[width];
};

// gy of `width` elements, in y.
template <class scalar_t, int width>
__device__ __forceinline__ void backward_signal(const BackwardArguments& x, std::int64_t shared, std::int64_t own,
                                                typename Held<scalar_t>::type (&y)[width]) {
  typename Held<scalar_t>::type other[width], pre[width];
  load_elements_at(static_cast<const scalar_t*>(x.g) + own, y);
  if (x.g2) {
    load_elements_at(static_cast<const scalar_t*>(x.g2) + own, other);
#pragma unroll
    for (int i = 0; i < width; ++i) y[i] += other[i];
  }
  if (x.first && x.shape.first_is_mask) {
    select(static_cast<const std::uint8_t*>(x.first) + shared, y);
  } else if (x.first) {
    load_elements_at(static_cast<const scalar_t*>(x.first) + shared, other);
#pragma unroll
    for (int i = 0; i < width; ++i) y[i] *= other[i];
  }
  if (x.second) {
    load_elements_at(static_cast<const scalar_t*>(x.second) + shared, other);
    load_elements_at(static_cast<const scalar_t*>(x.pre) + own, pre);
#pragma unroll
    for (int i = 0; i < width; ++i) y[i] += other[i] * pre[i];
  }
}

template <class scalar_t, int width>
__device__ __forceinline__ void backward_elements(const BackwardArguments& x, std::int64_t shared, std::int64_t own,
                                                  bool sum_gain,
                                                  BackwardChannels<typename Held<scalar_t>::type, width>& channels) {
  using acc_t = typename Held<scalar_t>::type;
  acc_t y[width], other[width], delta[width] = {};
  backward_signal<scalar_t, width>(x, shared, own, y);
  if (x.gy) store_elements_at(static_cast<scalar_t*>(x.gy) + own, y);
#pragma unroll
  for (int i = 0; i < width; ++i) channels.bias_sum[i] += y[i];
  const bool moved = sum_gain && x.t;
  if (moved || (x.gt && x.gain.data)) load_elements_at(static_cast<const scalar_t*>(x.delta) + shared, delta);
  if (sum_gain && x.centered) {
    load_elements_at(static_cast<const scalar_t*>(x.centered) + shared, other);
#pragma unroll
    for (int i = 0; i < width; ++i) channels.gain_sum[i] += y[i] * other[i];
  }
  if (moved) {
    load_elements_at(static_cast<const scalar_t*>(x.t) + own, other);
#pragma unroll
    for (int i = 0; i < width; ++i) channels.gain_sum[i] += channels.inv_std[i] * (delta[i] * other[i]);
  }
  if (!x.gt) return;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    y[i] = (x.scale ? channels.scale[i] * y[i] : y[i]) + channels.gain[i] * delta[i];
  }
  store_elements_at(static_cast<scalar_t*>(x.gt) + own, y);
}

// bias_partial, gain_partial: [chunks, K, C], null where not wanted.
template <class scalar_t, int width>
__global__ void __launch_bounds__(kBlockSize, kBackwardBlocksPerMultiprocessor)
    tangent_backward_kernel(const __grid_constant__ BackwardArguments x, const __grid_constant__ Tile tile,
                            double* __restrict__ bias_partial, double* __restrict__ gain_partial) {
  CURVLAB_SHARED(double, scratch, [width][kBlockSize]);
  using acc_t = typename Held<scalar_t>::type;
  const Place place(tile);
  const bool active = place.channel < tile.channels;
  BackwardChannels<acc_t, width> channels;
  load_channels(x.scale, place.channel, active, channels.scale);
  load_channels(x.inv_std, place.channel, active, channels.inv_std);
  for (std::int64_t k = blockIdx.z; k < x.shape.directions; k += gridDim.z) {
    load_channels(x.gain.data, k * x.gain.stride + place.channel, active, channels.gain);
    for (std::int64_t chunk = blockIdx.x; chunk < tile.chunks; chunk += gridDim.x) {
      const std::int64_t end = smaller((chunk + 1) * tile.chunk_rows, tile.rows);
#pragma unroll
      for (int i = 0; i < width; ++i) channels.bias_sum[i] = channels.gain_sum[i] = acc_t(0);
      for (std::int64_t row = chunk * tile.chunk_rows + place.lane; row < end; row += place.lanes) {
        const std::int64_t shared = row * tile.channels + place.channel;
        if (!active || shared >= tile.plane) break;
        backward_elements<scalar_t, width>(x, shared, k * tile.plane + shared, gain_partial != nullptr, channels);
      }
      const std::int64_t sums = (chunk * x.shape.directions + k) * tile.channels;
      if (bias_partial) store_chunk_sums(tile, place, channels.bias_sum, scratch, bias_partial + sums);
      if (gain_partial) store_chunk_sums(tile, place, channels.gain_sum, scratch, gain_partial + sums);
    }
  }
}

}  // namespace curvlab::hvp
