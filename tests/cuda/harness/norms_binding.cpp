// SPDX-License-Identifier: Apache-2.0
// The launchers of csrc/norms on host memory, callable through ctypes. The functions return nullptr, or what went
// wrong.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "norms/filter_norms_cuda.h"
#include "norms/multi_tensor_norms_cuda.h"
#include "simt_host.h"

namespace {

std::string message;

template <class F>
const char* guarded(F launch) {
  try {
    return launch();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <class T>
std::vector<T> garbage(std::int64_t n) {  // device memory that nobody has written: NaN, or pointers to nowhere
  std::vector<T> v(static_cast<size_t>(n));
  if (n) std::memset(static_cast<void*>(v.data()), 0xFF, sizeof(T) * v.size());
  return v;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void host_set_order(int order, std::uint64_t seed) {
  simt::options = {static_cast<simt::Order>(order), seed};
}

// launches, blocks, threads, switches, barriers, warp operations since the last call
__attribute__((visibility("default"))) void host_take_statistics(std::uint64_t* six) {
  std::memcpy(six, &simt::statistics, sizeof simt::statistics);
  simt::statistics = {};
}

__attribute__((visibility("default"))) const char* host_multi_tensor_norms(
    std::int64_t tensors, const void* const* x, const void* const* reference, const std::int64_t* numel,
    const std::int32_t* type, std::int32_t mode, std::int32_t multiprocessors, unsigned* ticket, double* out) {
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

__attribute__((visibility("default"))) const char* host_filter_norms(std::int64_t tensors, const void* const* x,
                                                                     const std::int64_t* rows,
                                                                     const std::int64_t* row_numel,
                                                                     const std::int32_t* type,
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

}  // extern "C"
