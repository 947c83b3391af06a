// SPDX-License-Identifier: Apache-2.0
// activation_factors: checks and arguments, for the CPU, CUDA and fake kernels.
#pragma once

#include <c10/util/string_view.h>

#include "hvp/activation_factors.h"
#include "hvp/arguments.h"

namespace curvlab::hvp {

inline Activation activation_named(std::string_view kind) {
  if (kind == "relu") return Activation::kRelu;
  if (kind == "leaky_relu") return Activation::kLeakyRelu;
  if (kind == "tanh") return Activation::kTanh;
  if (kind == "sigmoid") return Activation::kSigmoid;
  if (kind == "softplus") return Activation::kSoftplus;
  if (kind == "gelu") return Activation::kGelu;
  if (kind == "gelu_tanh") return Activation::kGeluTanh;
  if (kind == "silu") return Activation::kSilu;
  TORCH_CHECK_VALUE(false, "activation_factors: kind must be relu, leaky_relu, tanh, sigmoid, softplus, gelu, ",
                    "gelu_tanh or silu, got '", kind, "'");
}

inline Activation check_activation(const at::Tensor& z, const OptionalTensor& delta, std::string_view kind,
                                   const at::Tensor& first, const OptionalTensor& second) {
  constexpr const char* op = "activation_factors";
  const Activation activation = activation_named(kind);
  const at::ScalarType type = z.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16, op,
                   ": z must be float32, float64 or bfloat16, got ", dtype_name(type));
  const auto like_z = [&](const char* name, const at::Tensor& x, at::ScalarType wanted) {
    TORCH_CHECK_VALUE(x.device() == z.device(), op, ": ", name, " must be on ", z.device(), " like z, got ",
                      x.device());
    TORCH_CHECK_TYPE(x.scalar_type() == wanted, op, ": ", name, " must be ", dtype_name(wanted), ", got ",
                     dtype_name(x.scalar_type()));
    TORCH_CHECK_VALUE(x.sym_sizes() == z.sym_sizes(), op, ": ", name, " must have shape ", z.sym_sizes(),
                      " like z, got ", x.sym_sizes());
    TORCH_CHECK_VALUE(x.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", x.sym_strides());
  };
  like_z("z", z, type);
  like_z("first", first, activation == Activation::kRelu ? at::kByte : type);
  if (given(delta)) like_z("delta", *delta, type);
  if (given(second)) like_z("second", *second, type);
  TORCH_CHECK_VALUE(given(delta) || !given(second), op, ": second must come with delta, got second alone");
  return activation;
}

inline ActivationArguments activation_arguments(const at::Tensor& z, const OptionalTensor& delta, Activation kind,
                                                ActivationParameters parameters, const at::Tensor& first,
                                                const OptionalTensor& second) {
  return {.elements = z.numel(),
          .type = element_type(z.scalar_type()),
          .kind = kind,
          .parameters = parameters,
          .z = z.const_data_ptr(),
          .delta = given(second) ? data_of(delta) : nullptr,
          .first = first.mutable_data_ptr(),
          .second = writable(second)};
}

}  // namespace curvlab::hvp
