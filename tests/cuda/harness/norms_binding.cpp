// SPDX-License-Identifier: Apache-2.0
// The launchers of csrc/norms on host memory, callable through ctypes. The functions return nullptr, or what went
// wrong.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "binding.h"
#include "norms/filter_norms_cuda.h"
#include "norms/multi_tensor_norms_cuda.h"

CURVLAB_EXPORT const char* host_multi_tensor_norms(std::int64_t tensors, const void* const* x,
                                                   const void* const* reference, const std::int64_t* numel,
                                                   const std::int32_t* type, std::int32_t mode,
                                                   std::int32_t multiprocessors, unsigned* ticket, double* out) {
  using namespace curvlab::norms;
  return guarded([&] {
    std::vector<NormEntry> entries(static_cast<size_t>(tensors));
    for (std::int64_t t = 0; t < tensors; ++t)
      entries[t] = {x[t], reference ? reference[t] : nullptr, numel[t], 0, type[t]};
    const std::int64_t chunks = assign_cuda_chunks(entries.data(), tensors);
    std::vector<double> workspace = garbage<double>(cuda_workspace_doubles(tensors, chunks));
    std::vector<NormEntry> table = garbage<NormEntry>(tensors > kLargeTable ? tensors : 0);
    return launch_multi_tensor_norms({.entries = entries.data(),
                                      .tensors = tensors,
                                      .chunks = chunks,
                                      .mode = static_cast<NormMode>(mode),
                                      .workspace = workspace.data(),
                                      .device_table = table.empty() ? nullptr : table.data(),
                                      .ticket = ticket,
                                      .out = out,
                                      .multiprocessors = multiprocessors},
                                     nullptr);
  });
}

CURVLAB_EXPORT const char* host_filter_norms(std::int64_t tensors, const void* const* x, const std::int64_t* rows,
                                             const std::int64_t* row_numel, const std::int32_t* type,
                                             std::int32_t multiprocessors, double* out) {
  using namespace curvlab::norms;
  return guarded([&] {
    std::vector<FilterEntry> entries(static_cast<size_t>(tensors));
    for (std::int64_t t = 0; t < tensors; ++t) entries[t] = {x[t], rows[t], row_numel[t], 0, 0, type[t]};
    const std::int64_t items = assign_items(entries.data(), tensors);
    std::vector<FilterEntry> table = garbage<FilterEntry>(tensors > kFilterLargeTable ? tensors : 0);
    return launch_filter_norms({.entries = entries.data(),
                                .tensors = tensors,
                                .items = items,
                                .device_table = table.empty() ? nullptr : table.data(),
                                .out = out,
                                .multiprocessors = multiprocessors},
                               nullptr);
  });
}
