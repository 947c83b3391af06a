// SPDX-License-Identifier: Apache-2.0
// From tensors to the arguments of the kernels: every check, for the CPU, CUDA and fake kernels alike (so sizes may be
// symbolic), and the pointers. Checks are what a call of a tiny net consists of: no message is made before it is
// needed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/elements.h"

namespace curvlab::hvp {

using OptionalTensor = std::optional<at::Tensor>;

inline bool given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

inline const at::Tensor* pointer_to(const OptionalTensor& tensor) { return given(tensor) ? &*tensor : nullptr; }

inline ElementType element_type(at::ScalarType type) {
  return type == at::kDouble ? kFloat64 : type == at::kBFloat16 ? kBFloat16 : kFloat32;
}

// What sums are accumulated in, and the type of arguments per channel.
inline at::ScalarType accumulation_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline c10::SymInt middle_size(const at::Tensor& x, std::int64_t first) {
  c10::SymInt size = 1;
  for (std::int64_t i = first; i + 1 < x.dim(); ++i) size = size * x.sym_size(i);
  return size;
}

// The checks of one call, which refer to its main argument, [K, ..., C].
class Checks {
 public:
  Checks(const char* op, const char* name, const at::Tensor& main) : op_(op), name_(name), main_(main) {
    const at::ScalarType type = main.scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16, op, ": ", name,
                     " must be float32, float64 or bfloat16, got ", dtype_name(type));
    TORCH_CHECK_VALUE(main.dim() >= 2, op, ": ", name, " must be [K, ..., C], got ", main.sym_sizes());
    check_dense(name, main);
  }

  // Like the main argument in everything.
  void data(const char* name, const at::Tensor& x) const {
    if (!x.defined() || x.is_same(main_)) return;
    check_device(name, x);
    check_type(name, x, main_.scalar_type());
    TORCH_CHECK_VALUE(x.sym_sizes() == main_.sym_sizes(), op_, ": ", name, " must have shape ", main_.sym_sizes(),
                      " like ", name_, ", got ", x.sym_sizes());
    check_dense(name, x);
  }
  void data(const char* name, const OptionalTensor& x) const {
    if (given(x)) data(name, *x);
  }

  // [..., C], the same for every direction; `mask`: uint8 (or bool) is allowed.
  void shared(const char* name, const OptionalTensor& x, bool mask = false) const {
    if (!given(x)) return;
    check_device(name, *x);
    if (!mask || !is_mask(*x)) check_type(name, *x, main_.scalar_type());
    TORCH_CHECK_VALUE(
        x->dim() >= 1 && x->sym_size(-1) == main_.sym_size(-1) && middle_size(*x, 0) == middle_size(main_, 1), op_,
        ": ", name, " must have shape ", main_.sym_sizes().slice(1), " (", name_, " without its first dimension), got ",
        x->sym_sizes());
    check_dense(name, *x);
  }

  // [C], of the accumulation type; another floating type is converted by channels().
  void channel(const char* name, const OptionalTensor& x) const {
    if (!given(x)) return;
    check_device(name, *x);
    check_channel_type(name, *x);
    TORCH_CHECK_VALUE(x->dim() == 1 && x->sym_size(0) == main_.sym_size(-1), op_, ": ", name, " must have shape [",
                      main_.sym_size(-1), "] (the channels of ", name_, "), got ", x->sym_sizes());
  }

  // [K, C].
  void channel_rows(const char* name, const OptionalTensor& x) const {
    if (!given(x)) return;
    check_device(name, *x);
    check_channel_type(name, *x);
    check_channel_rows(name, *x);
  }

  // [K, C] to be written: of the accumulation type, rows anywhere, their numbers one after another.
  void sums(const char* name, const OptionalTensor& x) const {
    if (!given(x)) return;
    check_device(name, *x);
    check_type(name, *x, accumulation_type(main_.scalar_type()));
    check_channel_rows(name, *x);
    TORCH_CHECK_VALUE(x->sym_size(1) <= 1 || x->sym_stride(1) == 1, op_, ": ", name,
                      " must have stride 1 along its channels, got strides ", x->sym_strides());
  }

  // Terms that only make sense together.
  void together(const char* name, bool is_given, const char* other, bool is_other) const {
    TORCH_CHECK_VALUE(!is_given || is_other, op_, ": ", name, " must come with ", other, ", got ", name, " alone");
  }

  static bool is_mask(const at::Tensor& x) { return x.scalar_type() == at::kByte || x.scalar_type() == at::kBool; }

  void check_device(const char* name, const at::Tensor& x) const {
    TORCH_CHECK_VALUE(x.device() == main_.device(), op_, ": ", name, " must be on ", main_.device(), " like ", name_,
                      ", got ", x.device());
  }
  void check_type(const char* name, const at::Tensor& x, at::ScalarType wanted) const {
    TORCH_CHECK_TYPE(x.scalar_type() == wanted, op_, ": ", name, " must be ", dtype_name(wanted), ", got ",
                     dtype_name(x.scalar_type()));
  }
  void check_dense(const char* name, const at::Tensor& x) const {
    TORCH_CHECK_VALUE(x.is_contiguous(), op_, ": ", name, " must be contiguous, got strides ", x.sym_strides(),
                      " for shape ", x.sym_sizes());
  }

 private:
  void check_channel_type(const char* name, const at::Tensor& x) const {
    TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), op_, ": ", name, " must be floating, got ",
                     dtype_name(x.scalar_type()));
  }
  void check_channel_rows(const char* name, const at::Tensor& x) const {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.sym_size(0) == main_.sym_size(0) && x.sym_size(1) == main_.sym_size(-1), op_,
                      ": ", name, " must have shape [", main_.sym_size(0), ", ", main_.sym_size(-1),
                      "] (directions and channels of ", name_, "), got ", x.sym_sizes());
  }

  const char* op_;
  const char* name_;
  const at::Tensor& main_;
};

// Pointers. Tensors have passed the checks.
inline const void* data_of(const at::Tensor& x) { return x.const_data_ptr(); }
inline const void* data_of(const OptionalTensor& x) { return given(x) ? x->const_data_ptr() : nullptr; }
inline void* writable(const OptionalTensor& x) { return given(x) ? x->mutable_data_ptr() : nullptr; }

// Arguments per channel as the kernels want them: a copy where type or strides differ, kept alive by `kept`.
inline at::Tensor channels(const OptionalTensor& x, at::ScalarType type) {
  if (!given(x)) return {};
  at::Tensor kept = x->scalar_type() == type ? *x : x->to(type);
  if (kept.dim() > 0 && kept.size(-1) > 1 && kept.stride(-1) != 1) kept = kept.contiguous();
  return kept;
}

inline const void* data_or_null(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

}  // namespace curvlab::hvp
