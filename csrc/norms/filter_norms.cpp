// SPDX-License-Identifier: Apache-2.0
// filter_norms: checks, CPU and fake kernels, registration.
#include "norms/filter_norms.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common/no_gradient.h"
#include "norms/cpu_kernels.h"
#include "norms/tensor_lists.h"

namespace curvlab::norms {
namespace {

constexpr std::int64_t kSerialElements = 65536;

double row_norm(const FilterEntry& entry, std::int64_t row) {
  const auto sum_chunk = cpu_kernels().sum_chunk[static_cast<int>(NormMode::kL2Only)][entry.type];
  const char* x = static_cast<const char*>(entry.x) + row * entry.row_numel * element_size(entry.type);
  CompensatedSum sum;
  ChunkRow part;
  for (std::int64_t i = 0; i < entry.row_numel; i += kCpuChunkElements) {
    const std::int64_t n = std::min(kCpuChunkElements, entry.row_numel - i);
    sum_chunk(x + i * element_size(entry.type), nullptr, n, &part);
    sum.add(part.values[kL2]);
  }
  return std::sqrt(sum.value());
}

template <class scalar_t>
void absolute_values(const void* data, std::int64_t begin, std::int64_t end, double* out) {
  const scalar_t* x = static_cast<const scalar_t*>(data);
  for (std::int64_t i = begin; i < end; ++i) out[i] = std::fabs(static_cast<double>(load_element(x[i])));
}

// Rows of one element (biases): a call of the chunk kernel each took 15 times as long.
void absolute_values(const FilterEntry& entry, std::int64_t begin, std::int64_t end, double* out) {
  switch (entry.type) {
    case kFloat32:
      return absolute_values<float>(entry.x, begin, end, out);
    case kFloat64:
      return absolute_values<double>(entry.x, begin, end, out);
    case kBFloat16:
      return absolute_values<BFloat16Bits>(entry.x, begin, end, out);
    default:
      return absolute_values<Float16Bits>(entry.x, begin, end, out);
  }
}

// The rows whose first element is one of elements [begin, end) of the whole list: shares of equal work.
void norm_rows(const FilterTensors& list, std::int64_t begin, std::int64_t end, double* out) {
  std::int64_t first = 0;  // element at which the entry begins
  for (const FilterEntry& entry : list.entries) {
    const std::int64_t numel = entry.rows * entry.row_numel, per_row = std::max<std::int64_t>(entry.row_numel, 1);
    const auto row_at = [&](std::int64_t element) {
      return (std::clamp<std::int64_t>(element - first, 0, numel) + per_row - 1) / per_row;
    };
    const std::int64_t from = row_at(begin), to = row_at(end);
    if (entry.row_numel == 1) {
      absolute_values(entry, from, to, out + entry.first_row);
    } else {
      for (std::int64_t row = from; row < to; ++row) out[entry.first_row + row] = row_norm(entry, row);
    }
    first += numel;
  }
}

at::Tensor filter_norms_cpu(at::TensorList tensors) {
  check_filter_list(tensors);
  const FilterTensors list(tensors);
  at::Tensor out = at::zeros({list.rows}, at::kDouble);  // rows without elements stay 0
  double* values = out.mutable_data_ptr<double>();
  std::int64_t elements = 0;
  for (const FilterEntry& entry : list.entries) elements += entry.rows * entry.row_numel;
  if (elements < kSerialElements) {
    norm_rows(list, 0, elements, values);
  } else {
    at::parallel_for(0, elements, kSerialElements,
                     [&](std::int64_t begin, std::int64_t end) { norm_rows(list, begin, end, values); });
  }
  return out;
}

at::Tensor filter_norms_meta(at::TensorList tensors) {
  check_filter_list(tensors);
  c10::SymInt rows = 0;
  for (const at::Tensor& tensor : tensors) rows += tensor.dim() == 0 ? c10::SymInt(1) : tensor.sym_size(0);
  const at::TensorOptions options = tensors.empty() ? at::TensorOptions(at::kMeta) : tensors[0].options();
  return at::empty_symint({rows}, options.dtype(at::kDouble));
}

// Reached without a tensor, and by devices that have no kernel.
at::Tensor filter_norms_other(at::TensorList tensors) {
  check_no_kernel("filter_norms", tensors);
  return at::zeros({0}, at::kDouble);
}

at::Tensor filter_norms_autograd(at::TensorList tensors) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("curvlab::filter_norms", "").typed<at::Tensor(at::TensorList)>();
  return without_gradient("filter_norms", {tensors}, [&] { return op.call(tensors); });
}

}  // namespace
}  // namespace curvlab::norms

TORCH_LIBRARY_IMPL(curvlab, CPU, m) { m.impl("filter_norms", curvlab::norms::filter_norms_cpu); }
TORCH_LIBRARY_IMPL(curvlab, Meta, m) { m.impl("filter_norms", curvlab::norms::filter_norms_meta); }
TORCH_LIBRARY_IMPL(curvlab, CompositeExplicitAutograd, m) {
  m.impl("filter_norms", curvlab::norms::filter_norms_other);
}
TORCH_LIBRARY_IMPL(curvlab, Autograd, m) { m.impl("filter_norms", curvlab::norms::filter_norms_autograd); }
