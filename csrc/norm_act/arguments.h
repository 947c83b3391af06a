// SPDX-License-Identifier: Apache-2.0
// The checks of batch_norm_relu and its backward, for the CPU and fake kernels alike: sizes may be symbolic.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>

#include "common/check.h"

namespace curvlab::norm_act {

using OptionalTensor = std::optional<at::Tensor>;
using SymSizes = std::array<c10::SymInt, 4>;

inline bool given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

inline void check_channel(const char* op, const char* name, const OptionalTensor& tensor, const at::Tensor& x,
                          at::ScalarType type) {
  if (!given(tensor)) return;
  TORCH_CHECK_TYPE(tensor->scalar_type() == type, op, ": ", name, " must be ", dtype_name(type), ", got ",
                   dtype_name(tensor->scalar_type()));
  TORCH_CHECK_VALUE(tensor->device() == x.device(), op, ": ", name, " must be on ", x.device(), " like x, got ",
                    tensor->device());
  TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->sym_size(0) == x.sym_size(1), op, ": ", name, " must be [",
                    x.sym_size(1), "] (channels of x), got ", tensor->sym_sizes());
}

inline void check_data(const char* op, const at::Tensor& x, bool pool) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op,
                   ": x must be float32 or float64, got ", dtype_name(x.scalar_type()));
  TORCH_CHECK_TYPE(x.layout() == at::kStrided, op, ": x must be a dense (strided) tensor, got layout ", x.layout());
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x must be [N, C, H, W], got ", x.sym_sizes());
  TORCH_CHECK_VALUE(!pool || (x.sym_size(2) >= 2 && x.sym_size(3) >= 2), op,
                    ": x must be at least 2 high and wide for pooling, got ", x.sym_sizes());
}

inline SymSizes out_size(const at::Tensor& x, bool pool) {
  const std::int64_t step = pool ? 2 : 1;
  return {x.sym_size(0), x.sym_size(1), x.sym_size(2) / step, x.sym_size(3) / step};
}

inline void check_forward(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                          bool pool) {
  constexpr const char* op = "batch_norm_relu";
  check_data(op, x, pool);
  check_channel(op, "weight", weight, x, x.scalar_type());
  check_channel(op, "bias", bias, x, x.scalar_type());
  check_channel(op, "running_mean", running_mean, x, x.scalar_type());
  check_channel(op, "running_var", running_var, x, x.scalar_type());
  TORCH_CHECK_VALUE(given(running_mean) == given(running_var), op,
                    ": running_mean and running_var must both be tensors or both None, got one of each");
  TORCH_CHECK_VALUE(training || given(running_mean), op,
                    ": running_mean and running_var must be tensors where training is False, got None");
  TORCH_CHECK_VALUE(!training || x.sym_size(0) * x.sym_size(2) * x.sym_size(3) != 1, op,
                    ": x must have more than one value per channel when training, got ", x.sym_sizes());
}

inline void check_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                           const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& inv_std, bool pool) {
  constexpr const char* op = "batch_norm_relu_backward";
  check_data(op, x, pool);
  check_channel(op, "weight", weight, x, x.scalar_type());
  check_channel(op, "bias", bias, x, x.scalar_type());
  check_channel(op, "mean", mean, x, at::kDouble);
  check_channel(op, "inv_std", inv_std, x, at::kDouble);
  const SymSizes out = out_size(x, pool);
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), op, ": grad must be ", dtype_name(x.scalar_type()),
                   " like x, got ", dtype_name(grad.scalar_type()));
  TORCH_CHECK_VALUE(grad.device() == x.device(), op, ": grad must be on ", x.device(), " like x, got ", grad.device());
  TORCH_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(out), op, ": grad must be ", c10::SymIntArrayRef(out),
                    " (the output's shape), got ", grad.sym_sizes());
}

}  // namespace curvlab::norm_act
