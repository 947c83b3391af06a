// SPDX-License-Identifier: Apache-2.0
// The few runtime calls a launcher may make. A bad launch configuration sets the last error, as on a device; a fault
// inside a kernel throws simt::Fault, which says more than an error code could.
#pragma once
#include <cstddef>
#include <map>

using cudaStream_t = struct CUstream_st*;

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};

enum cudaFuncAttribute : int { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace simt {
inline cudaError_t last_error = cudaSuccess;

constexpr size_t kDynamicLimit = 48 * 1024;    // without asking for more
constexpr size_t kDynamicLargest = 99 * 1024;  // that every device of compute capability 8.0 on grants
inline std::map<const void*, size_t>& dynamic_limits = *new std::map<const void*, size_t>;  // kernels that asked

inline size_t dynamic_limit(const void* kernel) {
  const auto found = dynamic_limits.find(kernel);
  return found == dynamic_limits.end() ? kDynamicLimit : found->second;
}
}  // namespace simt

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > simt::kDynamicLargest) return simt::last_error = cudaErrorInvalidValue;
  simt::dynamic_limits[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

inline cudaError_t cudaPeekAtLastError() { return simt::last_error; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t e = simt::last_error;
  simt::last_error = cudaSuccess;
  return e;
}
inline const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}
inline const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
  }
  return "unrecognized error code";
}
