// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of tangent_forward: one pass, every input and output touched once, 16 bytes a thread where the shape
// allows. Blocks lie over chunks of rows (x), tiles of channels (y) and directions (z).
#pragma once

#include <cstdint>

#include "hvp/tile.cuh"

namespace curvlab::hvp {

constexpr int kForwardBlocksPerMultiprocessor = 3;

template <class scalar_t, int width>
__device__ __forceinline__ void forward_elements(const ForwardArguments& x, std::int64_t shared, std::int64_t own,
                                                 const typename Held<scalar_t>::type (&scale)[width],
                                                 const typename Held<scalar_t>::type (&bias)[width],
                                                 const typename Held<scalar_t>::type (&gain)[width], bool sum,
                                                 typename Held<scalar_t>::type (&dot)[width]) {
  using acc_t = typename Held<scalar_t>::type;
  acc_t y[width], other[width];
  load_elements_at(static_cast<const scalar_t*>(x.a) + own, y);
  if (x.b) {
    load_elements_at(static_cast<const scalar_t*>(x.b) + own, other);
#pragma unroll
    for (int i = 0; i < width; ++i) y[i] += other[i];
  }
  if (sum) {
    load_elements_at(static_cast<const scalar_t*>(x.delta) + shared, other);
#pragma unroll
    for (int i = 0; i < width; ++i) dot[i] += other[i] * y[i];
  }
#pragma unroll
  for (int i = 0; i < width; ++i) y[i] = (x.scale ? scale[i] * y[i] : y[i]) + bias[i];
  if (x.gain.data) {
    load_elements_at(static_cast<const scalar_t*>(x.centered) + shared, other);
#pragma unroll
    for (int i = 0; i < width; ++i) y[i] += gain[i] * other[i];
  }
  if (x.residual) {
    load_elements_at(static_cast<const scalar_t*>(x.residual) + own, other);
#pragma unroll
    for (int i = 0; i < width; ++i) y[i] += other[i];
  }
  if (x.pre) store_elements_at(static_cast<scalar_t*>(x.pre) + own, y);
  if (x.first && x.shape.first_is_mask) {
    select(static_cast<const std::uint8_t*>(x.first) + shared, y);
  } else if (x.first) {
    load_elements_at(static_cast<const scalar_t*>(x.first) + shared, other);
#pragma unroll
    for (int i = 0; i < width; ++i) y[i] *= other[i];
  }
  store_elements_at(static_cast<scalar_t*>(x.out) + own, y);
}

// partial: [chunks, K, C], null without dot.
template <class scalar_t, int width>
__global__ void __launch_bounds__(kBlockSize, kForwardBlocksPerMultiprocessor)
    tangent_forward_kernel(const __grid_constant__ ForwardArguments x, const __grid_constant__ Tile tile,
                           double* __restrict__ partial) {
  CURVLAB_SHARED(double, scratch, [width][kBlockSize]);
  using acc_t = typename Held<scalar_t>::type;
  const Place place(tile);
  const bool active = place.channel < tile.channels;
  acc_t scale[width];
  load_channels(x.scale, place.channel, active, scale);
  for (std::int64_t k = blockIdx.z; k < x.shape.directions; k += gridDim.z) {
    acc_t bias[width], gain[width];
    load_channels(x.bias.data, k * x.bias.stride + place.channel, active, bias);
    load_channels(x.gain.data, k * x.gain.stride + place.channel, active, gain);
    for (std::int64_t chunk = blockIdx.x; chunk < tile.chunks; chunk += gridDim.x) {
      const std::int64_t end = smaller((chunk + 1) * tile.chunk_rows, tile.rows);
      acc_t dot[width] = {};
      for (std::int64_t row = chunk * tile.chunk_rows + place.lane; row < end; row += place.lanes) {
        const std::int64_t shared = row * tile.channels + place.channel;
        if (!active || shared >= tile.plane) break;
        forward_elements<scalar_t, width>(x, shared, k * tile.plane + shared, scale, bias, gain, partial != nullptr,
                                          dot);
      }
      if (partial) {
        double* sums = partial + (chunk * x.shape.directions + k) * tile.channels;
        store_chunk_sums(tile, place, dot, scratch, sums);
      }
    }
  }
}

}  // namespace curvlab::hvp
