// SPDX-License-Identifier: Apache-2.0
// Tables of tensors for kernels that walk a list: by value in the kernel's parameters while they fit (no copy, no
// pinned memory, capturable in a graph), else in device memory, stored there by small kernels that get them by value.
#pragma once

#include <cstdint>

#include "common/launch.cuh"

namespace curvlab {

// At most 32,764 bytes of parameters (CUDA 12.1 and sm_70 on).
template <class Entry, int capacity>
struct InlineTable {
  Entry entries[capacity];
};

template <class Entry>
struct DeviceTable {
  const Entry* entries;
};

// The last entry whose `first` is <= index, where `first` rises along the table. Entries without work have the `first`
// of the next one and are never the answer. `low` is a lower bound that the caller knows.
template <class Table, class First>
__device__ __forceinline__ int find_entry(const Table& table, int count, std::int64_t index, int low, First first) {
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first(table.entries[middle]) <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class Entry, int capacity>
__global__ void store_table_kernel(const __grid_constant__ InlineTable<Entry, capacity> table, int count,
                                   Entry* __restrict__ stored) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    stored[i] = table.entries[i];
  }
}

// Copies a host table to device memory in the order of the stream, `capacity` entries a launch.
template <class Entry, int capacity>
const char* store_table(const Entry* entries, std::int64_t count, Entry* stored, cudaStream_t stream) {
  for (std::int64_t begin = 0; begin < count; begin += capacity) {
    const int part = static_cast<int>(count - begin < capacity ? count - begin : capacity);
    InlineTable<Entry, capacity> table{};
    for (int i = 0; i < part; ++i) table.entries[i] = entries[begin + i];
    CURVLAB_LAUNCH((store_table_kernel<Entry, capacity>), 1, 256, 0, stream, table, part, stored + begin);
    if (const char* error = launch_error()) return error;
  }
  return nullptr;
}

}  // namespace curvlab
