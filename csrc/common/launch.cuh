// SPDX-License-Identifier: Apache-2.0
// Grid sizes and the check that every launch ends with.
#pragma once

#include <cstdint>

#include "common/device.cuh"

namespace curvlab {

inline std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) { return (value + divisor - 1) / divisor; }

// Blocks for a kernel whose blocks loop over `work` items: all items at once, or what the device can hold resident.
inline unsigned grid_for(std::int64_t work, int blocks_per_multiprocessor, int multiprocessors) {
  const std::int64_t resident = static_cast<std::int64_t>(blocks_per_multiprocessor) * multiprocessors;
  const std::int64_t blocks = work < resident ? work : resident;
  return static_cast<unsigned>(blocks > 1 ? blocks : 1);
}

// nullptr if the last launch was accepted, else CUDA's words.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace curvlab
