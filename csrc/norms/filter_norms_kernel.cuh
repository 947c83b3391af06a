// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of filter_norms. One launch: blocks walk over work items, an item being kRowsPerItem short rows (a
// warp each) or one long row (the whole block). Sums in a fixed order.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "common/load.cuh"
#include "common/reduce.cuh"
#include "common/table.cuh"
#include "norms/filter_norms.h"

namespace curvlab::norms {

constexpr int kFilterBlockSize = kRowsPerItem * kWarpSize;
constexpr int kFilterBlocksPerMultiprocessor = 4;
constexpr int kFilterUnroll = 2;

// Sum of squares over the share of thread `lane` of `lanes`; two running sums a thread, flushed with compensation every
// 64 steps, so that float64 rows of any length keep 1e-14.
template <class scalar_t, int lanes>
__device__ __forceinline__ double sum_squares(const scalar_t* __restrict__ x, std::int64_t n, int lane) {
  using held_t = typename Held<scalar_t>::type;
  const std::int64_t head = head_elements(x, n), loads = (n - head) / kPerLoad<scalar_t>;
  const std::int64_t tail = head + loads * kPerLoad<scalar_t>;
  const uint4* __restrict__ packed = reinterpret_cast<const uint4*>(x + head);
  CompensatedSum total;
  for (std::int64_t begin = lane; begin < loads; begin += 32 * lanes) {
    const std::int64_t end = begin + 32 * lanes < loads ? begin + 32 * lanes : loads;
    double sums[2] = {0.0, 0.0};
#pragma unroll kFilterUnroll
    for (std::int64_t i = begin; i < end; i += lanes) {
      const uint4 load = __ldg(packed + i);
      held_t values[kPerLoad<scalar_t>];
      unpack(load, values, scalar_t{});
#pragma unroll
      for (int k = 0; k < kPerLoad<scalar_t>; ++k) {
        const double value = values[k];
        sums[k % 2] += value * value;
      }
    }
    total.add(sums[0] + sums[1]);
  }
  double rest = 0.0;
  if (lane < head) rest += square(load_element(x[lane]));
  if (tail + lane < n) rest += square(load_element(x[tail + lane]));
  total.add(rest);
  return total.value();
}

template <int lanes>
__device__ __forceinline__ double sum_squares(const FilterEntry& entry, std::int64_t row, int lane) {
  const std::int64_t offset = row * entry.row_numel, n = entry.row_numel;
  switch (entry.type) {
    case kFloat32:
      return sum_squares<float, lanes>(static_cast<const float*>(entry.x) + offset, n, lane);
    case kFloat64:
      return sum_squares<double, lanes>(static_cast<const double*>(entry.x) + offset, n, lane);
    case kBFloat16:
      return sum_squares<BFloat16Bits, lanes>(static_cast<const BFloat16Bits*>(entry.x) + offset, n, lane);
    default:
      return sum_squares<Float16Bits, lanes>(static_cast<const Float16Bits*>(entry.x) + offset, n, lane);
  }
}

template <class Table>
__global__ void __launch_bounds__(kFilterBlockSize, kFilterBlocksPerMultiprocessor)
    filter_norms_kernel(const __grid_constant__ Table table, const int tensors, const std::int64_t items,
                        double* __restrict__ out) {
  CURVLAB_SHARED(double, warp_sums, [kRowsPerItem]);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  int t = 0;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    t = find_entry(table, tensors, item, t, [](const FilterEntry& entry) { return entry.first_item; });
    const FilterEntry& entry = table.entries[t];
    const std::int64_t index = item - entry.first_item;
    if (entry.row_numel < kLongRow) {
      const std::int64_t row = index * kRowsPerItem + warp;
      if (row < entry.rows) {
        const double sum = warp_sum(sum_squares<kWarpSize>(entry, row, lane));
        if (lane == 0) out[entry.first_row + row] = sqrt(sum);
      }
    } else {
      const double sum = warp_sum(sum_squares<kFilterBlockSize>(entry, index, thread));
      if (lane == 0) warp_sums[warp] = sum;
      __syncthreads();
      if (thread == 0) {
        double total = 0.0;
        for (int w = 0; w < kRowsPerItem; ++w) total += warp_sums[w];
        out[entry.first_row + index] = sqrt(total);
      }
      __syncthreads();
    }
  }
}

}  // namespace curvlab::norms
