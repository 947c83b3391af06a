// SPDX-License-Identifier: Apache-2.0
// What the tiled kernels share: a thread's place, loads and stores of `width` elements, sums over a block's rows and
// over blocks.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "common/load.cuh"
#include "hvp/tangent.h"
#include "hvp/tile.h"

namespace curvlab::hvp {

template <class scalar_t, int width>
__device__ __forceinline__ void load_elements_at(const scalar_t* x, typename Held<scalar_t>::type (&values)[width]) {
  if constexpr (width == 1) {
    values[0] = load_element(*x);
  } else if constexpr (sizeof(scalar_t) == 8) {  // nvcc 13.0 makes two loads of 8 bytes of a uint4 here
    const double2 load = *reinterpret_cast<const double2*>(x);
    values[0] = load.x;
    values[1] = load.y;
  } else {  // not __ldg: the result may take the place of an input
    unpack(*reinterpret_cast<const uint4*>(x), values, scalar_t{});
  }
}

__device__ __forceinline__ void store_held(float* out, float value) { *out = value; }
__device__ __forceinline__ void store_held(double* out, double value) { *out = value; }
__device__ __forceinline__ void store_held(BFloat16Bits* out, float value) { *out = bfloat16_from_float(value); }

template <class scalar_t, int width>
__device__ __forceinline__ void store_elements_at(scalar_t* out, const typename Held<scalar_t>::type (&values)[width]) {
  if constexpr (width == 1) {
    store_held(out, values[0]);
  } else {
    *reinterpret_cast<uint4*>(out) = pack(values, scalar_t{});
  }
}

// Values whose byte is 0 become 0.
template <int width, class held_t>
__device__ __forceinline__ void select(const std::uint8_t* mask, held_t (&values)[width]) {
  std::uint64_t bytes = 0;
  if constexpr (width == 1) bytes = *mask;
  if constexpr (width == 2) bytes = *reinterpret_cast<const unsigned short*>(mask);
  if constexpr (width == 4) bytes = *reinterpret_cast<const unsigned*>(mask);
  if constexpr (width == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(mask);
    bytes = static_cast<std::uint64_t>(words.y) << 32 | words.x;
  }
#pragma unroll
  for (int i = 0; i < width; ++i) values[i] = (bytes >> (8 * i)) & 0xffu ? values[i] : held_t(0);
}

// A thread's place in the tile.
struct Place {
  std::int64_t channel;  // its first
  int lane, lanes;

  __device__ __forceinline__ explicit Place(const Tile& tile) {
    const int thread = static_cast<int>(threadIdx.x), column = thread & (tile.columns - 1);
    lane = thread / tile.columns;
    lanes = kBlockSize / tile.columns;
    channel = (static_cast<std::int64_t>(blockIdx.y) * tile.columns + column) * tile.width;
  }
};

// Arguments of a thread's channels; zeros where they are absent.
template <int width, class acc_t>
__device__ __forceinline__ void load_channels(const void* data, std::int64_t first, bool active,
                                              acc_t (&values)[width]) {
#pragma unroll
  for (int i = 0; i < width; ++i) values[i] = data && active ? static_cast<const acc_t*>(data)[first + i] : acc_t(0);
}

// Adds up a block's threads by channel, lanes pairwise in a fixed order, and stores the sums of its chunk.
template <int width, class acc_t>
__device__ __forceinline__ void store_chunk_sums(const Tile& tile, const Place& place, const acc_t (&sums)[width],
                                                 double (&scratch)[width][kBlockSize], double* __restrict__ out) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < width; ++i) scratch[i][thread] = static_cast<double>(sums[i]);
  __syncthreads();
  for (int half = place.lanes / 2; half > 0; half /= 2) {
    if (place.lane < half) {
#pragma unroll
      for (int i = 0; i < width; ++i) scratch[i][thread] += scratch[i][thread + half * tile.columns];
    }
    __syncthreads();
  }
  if (place.lane == 0 && place.channel < tile.channels) {
#pragma unroll
    for (int i = 0; i < width; ++i) out[place.channel + i] = scratch[i][thread];
  }
  __syncthreads();  // scratch is free again
}

// out[k, c] (+)= sum over chunks of partial[chunk, k, c] + inv_std[c] dot[k, c].
struct FinishArguments {
  const double* partial;
  std::int64_t chunks, directions, channels;
  void* out;
  std::int64_t stride;
  const void* inv_std;
  ChannelRows dot;
  bool accumulate;
};

constexpr int kFinishColumns = 32, kFinishLanes = kBlockSize / kFinishColumns;

template <class acc_t>
__global__ void __launch_bounds__(kBlockSize) finish_sums_kernel(const __grid_constant__ FinishArguments x) {
  CURVLAB_SHARED(double, scratch, [kFinishLanes][kFinishColumns]);
  const int column = static_cast<int>(threadIdx.x) % kFinishColumns,
            lane = static_cast<int>(threadIdx.x) / kFinishColumns;
  const std::int64_t sums = x.directions * x.channels;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kFinishColumns + column;
  double total = 0.0;
  if (index < sums) {
    for (std::int64_t chunk = lane; chunk < x.chunks; chunk += kFinishLanes) total += x.partial[chunk * sums + index];
  }
  scratch[lane][column] = total;
  __syncthreads();
  if (lane > 0 || index >= sums) return;
  for (int other = 1; other < kFinishLanes; ++other) total += scratch[other][column];
  const std::int64_t k = index / x.channels, c = index % x.channels;
  if (x.dot.data) {
    total += static_cast<double>(static_cast<const acc_t*>(x.inv_std)[c]) *
             static_cast<double>(static_cast<const acc_t*>(x.dot.data)[k * x.dot.stride + c]);
  }
  acc_t* out = static_cast<acc_t*>(x.out) + k * x.stride + c;
  *out = static_cast<acc_t>(x.accumulate ? static_cast<double>(*out) + total : total);
}

}  // namespace curvlab::hvp
