// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of pool_gather and pool_scatter. No atomics: where windows overlap, one thread adds up a channel of
// an image, windows rising, as the CPU does. Blocks lie over windows (x), tiles of channels (y) and images (z).
#pragma once

#include <cstdint>

#include "hvp/pool.h"
#include "hvp/tile.cuh"

namespace curvlab::hvp {

constexpr int kPoolBlocksPerMultiprocessor = 6;

template <class scalar_t>
__global__ void __launch_bounds__(kBlockSize, kPoolBlocksPerMultiprocessor)
    pool_gather_kernel(const __grid_constant__ PoolArguments pool, const __grid_constant__ Tile tile) {
  const Place place(tile);
  if (place.channel >= tile.channels) return;
  for (std::int64_t image = blockIdx.z; image < pool.directions * pool.samples; image += gridDim.z) {
    const scalar_t* x = static_cast<const scalar_t*>(pool.in) + image * pool.image() + place.channel;
    scalar_t* out = static_cast<scalar_t*>(pool.out) + image * pool.pooled() + place.channel;
    const std::int32_t* index = pool.index + image % pool.samples * pool.pooled() + place.channel;
    for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * tile.chunk_rows + place.lane;
         row < smaller((blockIdx.x + std::int64_t{1}) * tile.chunk_rows, tile.rows); row += place.lanes) {
      const std::int64_t i = index[row * pool.channels];
      scalar_t value{};
      if (i >= 0) value = x[i * pool.channels];
      out[row * pool.channels] = value;
    }
  }
}

// Where no input won twice; out holds zeros.
template <class scalar_t>
__global__ void __launch_bounds__(kBlockSize, kPoolBlocksPerMultiprocessor)
    pool_scatter_unique_kernel(const __grid_constant__ PoolArguments pool, const __grid_constant__ Tile tile) {
  const Place place(tile);
  if (place.channel >= tile.channels) return;
  for (std::int64_t image = blockIdx.z; image < pool.directions * pool.samples; image += gridDim.z) {
    const scalar_t* g = static_cast<const scalar_t*>(pool.in) + image * pool.pooled() + place.channel;
    scalar_t* out = static_cast<scalar_t*>(pool.out) + image * pool.image() + place.channel;
    const std::int32_t* index = pool.index + image % pool.samples * pool.pooled() + place.channel;
    for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * tile.chunk_rows + place.lane;
         row < smaller((blockIdx.x + std::int64_t{1}) * tile.chunk_rows, tile.rows); row += place.lanes) {
      const std::int64_t i = index[row * pool.channels];
      if (i >= 0) out[i * pool.channels] = g[row * pool.channels];
    }
  }
}

constexpr int kWindowsInFlight = 4;

// A thread a channel of an image; `sums` holds zeros: out itself, or floats where out is bfloat16.
template <class scalar_t, class sum_t>
__global__ void __launch_bounds__(kBlockSize, kPoolBlocksPerMultiprocessor)
    pool_scatter_kernel(const __grid_constant__ PoolArguments pool, sum_t* __restrict__ sums) {
  const std::int64_t columns = pool.directions * pool.samples * pool.channels;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kBlockSize;
  for (std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kBlockSize + threadIdx.x; column < columns;
       column += step) {
    const std::int64_t image = column / pool.channels, channel = column % pool.channels;
    const scalar_t* g = static_cast<const scalar_t*>(pool.in) + image * pool.pooled() + channel;
    sum_t* out = sums + image * pool.image() + channel;
    const std::int32_t* index = pool.index + image % pool.samples * pool.pooled() + channel;
    for (std::int64_t row = 0; row < pool.windows; row += kWindowsInFlight) {
      std::int64_t i[kWindowsInFlight];
      sum_t value[kWindowsInFlight];
#pragma unroll
      for (int w = 0; w < kWindowsInFlight; ++w) {  // loads first: the sums wait for memory one after another
        i[w] = row + w < pool.windows ? index[(row + w) * pool.channels] : -1;
        value[w] = i[w] >= 0 ? static_cast<sum_t>(load_element(g[(row + w) * pool.channels])) : sum_t(0);
      }
#pragma unroll
      for (int w = 0; w < kWindowsInFlight; ++w) {
        if (i[w] >= 0) out[i[w] * pool.channels] += value[w];
      }
    }
  }
}

__global__ void __launch_bounds__(kBlockSize)
    pool_round_kernel(const float* __restrict__ sums, std::int64_t elements, BFloat16Bits* __restrict__ out) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kBlockSize;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlockSize + threadIdx.x; i < elements; i += step) {
    out[i] = bfloat16_from_float(sums[i]);
  }
}

// Zeros: 16 bytes a thread where the address allows it.
__global__ void __launch_bounds__(kBlockSize) pool_zero_kernel(void* __restrict__ data, std::int64_t bytes) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kBlockSize;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlockSize + threadIdx.x;
  const std::int64_t whole = misalignment(data) == 0 ? bytes / kLoadBytes : 0;
  for (std::int64_t i = first; i < whole; i += step) static_cast<uint4*>(data)[i] = uint4{0, 0, 0, 0};
  unsigned short* pairs = static_cast<unsigned short*>(data);  // no element is smaller
  for (std::int64_t i = whole * (kLoadBytes / 2) + first; i < bytes / 2; i += step) pairs[i] = 0;
}

}  // namespace curvlab::hvp
