// SPDX-License-Identifier: Apache-2.0
// Launcher of multi_tensor_norms on CUDA: raw pointers and a stream, no torch and no CUDA header.
#pragma once

#include <cstdint>

#include "norms/multi_tensor_norms.h"

namespace curvlab::norms {

struct MultiTensorNormsLaunch {
  const NormEntry* entries;  // [tensors], host memory; first_chunk filled by assign_cuda_chunks
  std::int64_t tensors;      // >= 1
  std::int64_t chunks;       // what assign_cuda_chunks returned, may be 0
  NormMode mode;
  double* workspace;        // device, cuda_workspace_doubles(tensors, chunks) doubles, need not be initialized
  NormEntry* device_table;  // device, [tensors]; needed only if tensors > kLargeTable, else may be null
  unsigned* ticket;         // device, one counter that holds 0 now and again when the kernel ends
  double* out;              // device, [tensors + 1, kColumns]
  int multiprocessors;      // of the device that the stream belongs to
};

// Doubles of workspace: one row of partial sums per chunk and one row of sums per tensor.
inline std::int64_t cuda_workspace_doubles(std::int64_t tensors, std::int64_t chunks) {
  return kColumns * (tensors + chunks);
}

// One launch of the norms kernel on `stream` (a cudaStream_t); lists longer than kLargeTable first store their table
// with ceil(tensors / kLargeTable) small launches. No synchronization, no allocation, capturable in a graph.
// Returns nullptr, or what CUDA says went wrong.
const char* launch_multi_tensor_norms(const MultiTensorNormsLaunch& launch, void* stream);

}  // namespace curvlab::norms
