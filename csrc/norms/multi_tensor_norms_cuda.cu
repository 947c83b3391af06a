// SPDX-License-Identifier: Apache-2.0
#include "common/launch.cuh"
#include "common/table.cuh"
#include "norms/multi_tensor_norms_cuda.h"
#include "norms/multi_tensor_norms_kernel.cuh"

namespace curvlab::norms {
namespace {

template <NormMode mode, class Table>
const char* launch_with_table(const MultiTensorNormsLaunch& launch, const Table& table, cudaStream_t stream) {
  double* tensor_rows = launch.workspace + kColumns * launch.chunks;
  const NormsOutput output{tensor_rows, launch.out, launch.tensors};
  bool has_large = false;
  for (std::int64_t t = 0; t < launch.tensors; ++t) {
    has_large = has_large || cuda_chunk_count(launch.entries[t]) > kChunksPerWarp;
  }
  const unsigned grid = grid_for(launch.chunks, kNormsBlocksPerMultiprocessor, launch.multiprocessors);
  CURVLAB_LAUNCH((multi_tensor_norms_kernel<mode, Table>), grid, kNormsBlockSize, 0, stream, table, launch.chunks,
                 launch.workspace, output, has_large, launch.ticket);
  return launch_error();
}

template <NormMode mode, int capacity>
const char* launch_inline(const MultiTensorNormsLaunch& launch, cudaStream_t stream) {
  InlineTable<NormEntry, capacity> table{};
  for (std::int64_t t = 0; t < launch.tensors; ++t) table.entries[t] = launch.entries[t];
  return launch_with_table<mode>(launch, table, stream);
}

template <NormMode mode>
const char* launch_mode(const MultiTensorNormsLaunch& launch, cudaStream_t stream) {
  if (launch.tensors <= kSmallTable) return launch_inline<mode, kSmallTable>(launch, stream);
  if (launch.tensors <= kLargeTable) return launch_inline<mode, kLargeTable>(launch, stream);
  const char* error = store_table<NormEntry, kLargeTable>(launch.entries, launch.tensors, launch.device_table, stream);
  if (error) return error;
  return launch_with_table<mode>(launch, DeviceTable<NormEntry>{launch.device_table}, stream);
}

}  // namespace

const char* launch_multi_tensor_norms(const MultiTensorNormsLaunch& launch, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  switch (launch.mode) {
    case NormMode::kNorms:
      return launch_mode<NormMode::kNorms>(launch, stream);
    case NormMode::kWithReference:
      return launch_mode<NormMode::kWithReference>(launch, stream);
    default:
      return launch_mode<NormMode::kL2Only>(launch, stream);
  }
}

}  // namespace curvlab::norms
