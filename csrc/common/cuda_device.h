// SPDX-License-Identifier: Apache-2.0
// What registrations ask of the current CUDA device, with errors that name the op.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

namespace curvlab {

inline void check_launch(const char* op, const char* error) {
  TORCH_CHECK(error == nullptr, op, ": CUDA refused the launch: ", error);
}

inline void check_cuda(const char* op, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next check of anybody would report it again
  TORCH_CHECK(false, op, ": ", what, ": ", cudaGetErrorString(error));
}

inline int multiprocessors(const char* op) {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  check_cuda(op, "cannot ask the CUDA device", error);
  return count;
}

}  // namespace curvlab
