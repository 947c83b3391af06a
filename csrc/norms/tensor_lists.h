// SPDX-License-Identifier: Apache-2.0
// From lists of tensors to the tables that the CPU and CUDA kernels walk; every check of the arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <vector>

#include "common/check.h"
#include "norms/filter_norms.h"
#include "norms/multi_tensor_norms.h"

namespace curvlab::norms {

inline ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      return kFloat32;
  }
}

// What the arguments say, values and devices aside: also the check of the fake kernels. `same_shape` compares shapes,
// which may be symbolic there.
template <class SameShape>
NormMode check_norm_lists(at::TensorList tensors, at::TensorList reference, bool l2_only, SameShape same_shape) {
  constexpr const char* op = "multi_tensor_norms";
  TORCH_CHECK_VALUE(!l2_only || reference.empty(), op, ": reference must be empty with l2_only=True, got ",
                    reference.size(), " tensors");
  TORCH_CHECK_VALUE(reference.empty() || reference.size() == tensors.size(), op, ": reference must have ",
                    tensors.size(), " tensors like tensors, got ", reference.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    check_floating({op, "tensors", i}, tensors[i]);
    check_same_device({op, "tensors", i}, tensors[i], tensors[0]);
    if (reference.empty()) continue;
    const Argument argument{op, "reference", i};
    check_floating(argument, reference[i]);
    check_same_device(argument, reference[i], tensors[0]);
    TORCH_CHECK_TYPE(reference[i].scalar_type() == tensors[i].scalar_type(), argument, " must be ",
                     dtype_name(tensors[i].scalar_type()), " like tensors[", i, "], got ",
                     dtype_name(reference[i].scalar_type()));
    TORCH_CHECK_VALUE(same_shape(tensors[i], reference[i]), argument, " must have shape ", tensors[i].sym_sizes(),
                      " like tensors[", i, "], got ", reference[i].sym_sizes());
  }
  if (l2_only) return NormMode::kL2Only;
  return reference.empty() ? NormMode::kNorms : NormMode::kWithReference;
}

inline NormMode check_norm_lists(at::TensorList tensors, at::TensorList reference, bool l2_only) {
  return check_norm_lists(tensors, reference, l2_only,
                          [](const at::Tensor& a, const at::Tensor& b) { return a.sizes() == b.sizes(); });
}

// The table of multi_tensor_norms, for lists that passed check_norm_lists. Elements are read in memory order, so any
// dense layout that a tensor shares with its reference is read in place; others are copied, and `copies` keeps those
// alive.
struct NormTensors {
  std::vector<NormEntry> entries;
  std::vector<at::Tensor> copies;
  NormMode mode;

  NormTensors(at::TensorList tensors, at::TensorList reference, NormMode norm_mode) : mode(norm_mode) {
    entries.reserve(tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) add(tensors[i], reference.empty() ? nullptr : &reference[i]);
  }

  std::int64_t size() const { return static_cast<std::int64_t>(entries.size()); }

 private:
  const void* dense(const at::Tensor& tensor) {
    copies.push_back(tensor.contiguous());
    return copies.back().const_data_ptr();
  }

  static bool readable_in_place(const at::Tensor& x, const at::Tensor* reference) {
    if (x.is_contiguous()) return reference == nullptr || reference->is_contiguous();
    return x.is_non_overlapping_and_dense() && (reference == nullptr || x.strides() == reference->strides());
  }

  void add(const at::Tensor& x, const at::Tensor* reference) {
    NormEntry entry{nullptr, nullptr, x.numel(), 0, element_type(x.scalar_type())};
    const bool in_place = readable_in_place(x, reference);
    entry.x = in_place ? x.const_data_ptr() : dense(x);
    if (reference != nullptr) entry.reference = in_place ? reference->const_data_ptr() : dense(*reference);
    entries.push_back(entry);
  }
};

inline void check_filter_list(at::TensorList tensors) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    check_floating({"filter_norms", "tensors", i}, tensors[i]);
    check_same_device({"filter_norms", "tensors", i}, tensors[i], tensors[0]);
  }
}

// The table of filter_norms, for a list that passed check_filter_list: rows are dense blocks of memory one after
// another, or the tensor is copied.
struct FilterTensors {
  std::vector<FilterEntry> entries;
  std::vector<at::Tensor> copies;
  std::int64_t rows = 0, items = 0;

  explicit FilterTensors(at::TensorList tensors) {
    entries.reserve(tensors.size());
    for (const at::Tensor& tensor : tensors) add(tensor);
    items = assign_items(entries.data(), static_cast<std::int64_t>(entries.size()));
  }

 private:
  static bool rows_are_dense(const at::Tensor& x) {
    if (x.is_contiguous()) return true;
    return x.dim() > 1 && x.is_non_overlapping_and_dense() && x.stride(0) * x.size(0) == x.numel();
  }

  void add(const at::Tensor& x) {
    FilterEntry entry{};
    entry.rows = x.dim() == 0 ? 1 : x.size(0);
    entry.row_numel = entry.rows == 0 ? 0 : x.numel() / entry.rows;
    entry.type = element_type(x.scalar_type());
    if (rows_are_dense(x)) {
      entry.x = x.const_data_ptr();
    } else {
      copies.push_back(x.contiguous());
      entry.x = copies.back().const_data_ptr();
    }
    rows += entry.rows;
    entries.push_back(entry);
  }
};

}  // namespace curvlab::norms
