// SPDX-License-Identifier: Apache-2.0
// Sums over a warp in a fixed order: the same bits whatever the schedule.
#pragma once

#include "common/device.cuh"

namespace curvlab {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Sum over the 32 lanes, in every lane. a + b and b + a have the same bits, so all lanes agree.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// Largest value over the 32 lanes, in every lane; NaN if any is NaN (fmax would drop it).
__device__ __forceinline__ double warp_max_keep_nan(double value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kFullWarp, value, offset);
    value = other > value || other != other ? other : value;
  }
  return value;
}

}  // namespace curvlab
