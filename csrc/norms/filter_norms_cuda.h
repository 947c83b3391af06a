// SPDX-License-Identifier: Apache-2.0
// Launcher of filter_norms on CUDA: raw pointers and a stream, no torch and no CUDA header.
#pragma once

#include <cstdint>

#include "norms/filter_norms.h"

namespace curvlab::norms {

struct FilterNormsLaunch {
  const FilterEntry* entries;  // [tensors], host memory; first_row and first_item filled by assign_items
  std::int64_t tensors;        // >= 1
  std::int64_t items;          // what assign_items returned; 0: nothing is launched
  FilterEntry* device_table;   // device, [tensors]; needed only if tensors > kFilterLargeTable, else may be null
  double* out;                 // device, one double per row of every tensor, in list order
  int multiprocessors;         // of the device that the stream belongs to
};

// One launch of the filter norms kernel on `stream` (a cudaStream_t); longer lists first store their table, as in
// multi_tensor_norms. Returns nullptr, or what CUDA says went wrong.
const char* launch_filter_norms(const FilterNormsLaunch& launch, void* stream);

}  // namespace curvlab::norms
