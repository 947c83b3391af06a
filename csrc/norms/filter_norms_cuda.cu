// SPDX-License-Identifier: Apache-2.0
#include "common/launch.cuh"
#include "common/table.cuh"
#include "norms/filter_norms_cuda.h"
#include "norms/filter_norms_kernel.cuh"

namespace curvlab::norms {
namespace {

template <class Table>
const char* launch_with_table(const FilterNormsLaunch& launch, const Table& table, cudaStream_t stream) {
  const unsigned grid = grid_for(launch.items, kFilterBlocksPerMultiprocessor, launch.multiprocessors);
  CURVLAB_LAUNCH(filter_norms_kernel<Table>, grid, kFilterBlockSize, 0, stream, table, static_cast<int>(launch.tensors),
                 launch.items, launch.out);
  return launch_error();
}

template <int capacity>
const char* launch_inline(const FilterNormsLaunch& launch, cudaStream_t stream) {
  InlineTable<FilterEntry, capacity> table{};
  for (std::int64_t t = 0; t < launch.tensors; ++t) table.entries[t] = launch.entries[t];
  return launch_with_table(launch, table, stream);
}

}  // namespace

const char* launch_filter_norms(const FilterNormsLaunch& launch, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (launch.items == 0) return nullptr;
  if (launch.tensors <= kFilterSmallTable) return launch_inline<kFilterSmallTable>(launch, stream);
  if (launch.tensors <= kFilterLargeTable) return launch_inline<kFilterLargeTable>(launch, stream);
  const char* error =
      store_table<FilterEntry, kFilterLargeTable>(launch.entries, launch.tensors, launch.device_table, stream);
  if (error) return error;
  return launch_with_table(launch, DeviceTable<FilterEntry>{launch.device_table}, stream);
}

}  // namespace curvlab::norms
