// SPDX-License-Identifier: Apache-2.0
// multi_tensor_norms: checks, CPU and fake kernels, registration.
#include "norms/multi_tensor_norms.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "common/no_gradient.h"
#include "norms/cpu_kernels.h"
#include "norms/tensor_lists.h"

namespace curvlab::norms {
namespace {

constexpr std::int64_t kSerialElements = 65536;  // below, starting a second thread costs more than it saves

struct ChunkOf {
  const void* x;
  const void* reference;
  std::int64_t n;
};

std::int64_t cpu_chunk_count(const NormEntry& entry) {
  return (entry.numel + kCpuChunkElements - 1) / kCpuChunkElements;
}

ChunkOf chunk_of(const NormEntry& entry, std::int64_t chunk) {
  const std::int64_t offset = (chunk - entry.first_chunk) * kCpuChunkElements;
  const std::int64_t bytes = offset * element_size(entry.type);
  const char* reference = static_cast<const char*>(entry.reference);
  return {static_cast<const char*>(entry.x) + bytes, reference == nullptr ? nullptr : reference + bytes,
          std::min(kCpuChunkElements, entry.numel - offset)};
}

// Chunks [begin, end) of the list, wherever they lie in it.
void sum_chunks(const NormTensors& list, std::int64_t begin, std::int64_t end, ChunkRow* rows) {
  const auto& kernels = cpu_kernels().sum_chunk[static_cast<int>(list.mode)];
  auto entry = std::upper_bound(list.entries.begin(), list.entries.end(), begin,
                                [](std::int64_t chunk, const NormEntry& e) { return chunk < e.first_chunk; });
  --entry;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    while (chunk >= entry->first_chunk + cpu_chunk_count(*entry)) ++entry;
    const ChunkOf part = chunk_of(*entry, chunk);
    kernels[entry->type](part.x, part.reference, part.n, rows + chunk);
  }
}

// Adds rows (squares in the columns of l2, distance and reference_l2) in the order given; column by column, so that
// the compiler makes vectors of them.
struct RowSums {
  CompensatedSum sums[kRowColumns];
  double linf = 0.0;

  void add(const ChunkRow& row) {
    for (int column = 0; column < kRowColumns; ++column) sums[column].add(row.values[column]);
    linf = max_keep_nan(row.values[kLinf], linf);
  }
  ChunkRow total() const {
    ChunkRow row;
    for (int column = 0; column < kRowColumns; ++column) row.values[column] = sums[column].value();
    row.values[kLinf] = linf;
    return row;
  }
};

void store(const ChunkRow& row, NormMode mode, double* out) {
  for (int column = 0; column < kColumns; ++column) out[column] = finish(mode, column, row.values[column]);
}

ChunkRow sum_rows(const ChunkRow* rows, std::int64_t count) {
  if (count == 1) return rows[0];
  RowSums sums;
  for (std::int64_t i = 0; i < count; ++i) sums.add(rows[i]);
  return sums.total();
}

// Chunk rows -> tensors -> the whole list, in list order: the same bits for any number of threads.
void finish_rows(const NormTensors& list, const ChunkRow* rows, double* out) {
  RowSums global;
  for (const NormEntry& entry : list.entries) {
    const ChunkRow row = sum_rows(rows + entry.first_chunk, cpu_chunk_count(entry));
    global.add(row);
    store(row, list.mode, out);
    out += kColumns;
  }
  store(global.total(), list.mode, out);
}

at::Tensor multi_tensor_norms_cpu(at::TensorList tensors, at::TensorList reference, bool l2_only) {
  NormTensors list(tensors, reference, check_norm_lists(tensors, reference, l2_only));
  const std::int64_t chunks =
      assign_chunks(list.entries.data(), list.size(), [](const NormEntry& entry) { return cpu_chunk_count(entry); });
  TORCH_CHECK_VALUE(chunks >= 0, "multi_tensor_norms: tensors hold more than 2^32 chunks of ", kCpuChunkElements);
  std::int64_t elements = 0;
  for (const NormEntry& entry : list.entries) elements += entry.numel;
  c10::SmallVector<ChunkRow, 128> rows;
  rows.resize_for_overwrite(static_cast<std::size_t>(chunks));
  if (elements < kSerialElements) {
    if (chunks > 0) sum_chunks(list, 0, chunks, rows.data());
  } else {
    at::parallel_for(0, chunks, kSerialElements / kCpuChunkElements,
                     [&](std::int64_t begin, std::int64_t end) { sum_chunks(list, begin, end, rows.data()); });
  }
  at::Tensor out = at::empty({list.size() + 1, kColumns}, at::kDouble);
  finish_rows(list, rows.data(), out.mutable_data_ptr<double>());
  return out;
}

at::Tensor multi_tensor_norms_meta(at::TensorList tensors, at::TensorList reference, bool l2_only) {
  check_norm_lists(tensors, reference, l2_only,
                   [](const at::Tensor& a, const at::Tensor& b) { return a.sym_sizes() == b.sym_sizes(); });
  const at::TensorOptions options = tensors.empty() ? at::TensorOptions(at::kMeta) : tensors[0].options();
  return at::empty({static_cast<std::int64_t>(tensors.size()) + 1, kColumns}, options.dtype(at::kDouble));
}

// Reached without a tensor (the sums over nothing are 0), and by devices that have no kernel.
at::Tensor multi_tensor_norms_other(at::TensorList tensors, at::TensorList reference, bool) {
  check_no_kernel("multi_tensor_norms", tensors);
  TORCH_CHECK_VALUE(reference.empty(), "multi_tensor_norms: reference must have 0 tensors like tensors, got ",
                    reference.size());
  return at::zeros({1, kColumns}, at::kDouble);
}

at::Tensor multi_tensor_norms_autograd(at::TensorList tensors, at::TensorList reference, bool l2_only) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("curvlab::multi_tensor_norms", "")
                             .typed<at::Tensor(at::TensorList, at::TensorList, bool)>();
  return without_gradient("multi_tensor_norms", {tensors, reference},
                          [&] { return op.call(tensors, reference, l2_only); });
}

}  // namespace
}  // namespace curvlab::norms

TORCH_LIBRARY_IMPL(curvlab, CPU, m) { m.impl("multi_tensor_norms", curvlab::norms::multi_tensor_norms_cpu); }
TORCH_LIBRARY_IMPL(curvlab, Meta, m) { m.impl("multi_tensor_norms", curvlab::norms::multi_tensor_norms_meta); }
TORCH_LIBRARY_IMPL(curvlab, CompositeExplicitAutograd, m) {
  m.impl("multi_tensor_norms", curvlab::norms::multi_tensor_norms_other);
}
TORCH_LIBRARY_IMPL(curvlab, Autograd, m) { m.impl("multi_tensor_norms", curvlab::norms::multi_tensor_norms_autograd); }
