// SPDX-License-Identifier: Apache-2.0
// The checks of the masked convolutions, for the CPU, CUDA and fake kernels alike: sizes of data may be symbolic.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>

#include "common/check.h"
#include "sparse_conv/masked_conv2d.h"

namespace curvlab::sparse_conv {

using OptionalTensor = std::optional<at::Tensor>;

inline bool given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// The integer arguments of every op, in the order of their schemas.
#define CURVLAB_CONV_PARAMETERS                                                                            \
  at::IntArrayRef weight_shape, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, \
      std::int64_t groups
#define CURVLAB_CONV_ARGUMENTS weight_shape, stride, padding, dilation, groups

constexpr std::int64_t kLargestExtent = 1ll << 31;

inline void check_pair(const char* op, const char* name, at::IntArrayRef pair, std::int64_t least) {
  TORCH_CHECK_VALUE(pair.size() == 2 && pair[0] >= least && pair[1] >= least, op, ": ", name,
                    " must be two integers >= ", least, ", got ", pair);
  // Then dilation * (kernel - 1) + 2 * padding stays below 2^63.
  TORCH_CHECK_VALUE(pair[0] < kLargestExtent && pair[1] < kLargestExtent, op, ": ", name,
                    " must be two integers below 2^31, got ", pair);
}

inline bool fits_in_64_bits(at::IntArrayRef shape) {
  std::int64_t product = 1;
  for (const std::int64_t size : shape) {
    if (size >= kLargestExtent || __builtin_mul_overflow(product, size, &product)) return false;
  }
  return true;
}

inline ConvWeight conv_weight(const char* op, CURVLAB_CONV_PARAMETERS) {
  TORCH_CHECK_VALUE(weight_shape.size() == 4 && weight_shape[0] >= 0 && weight_shape[1] >= 0 && weight_shape[2] >= 1 &&
                        weight_shape[3] >= 1,
                    op, ": weight_shape must be [C_out, C_in / groups, kH, kW], got ", weight_shape);
  TORCH_CHECK_VALUE(fits_in_64_bits(weight_shape), op,
                    ": weight_shape must have sizes below 2^31 and fewer than 2^63 weights, got ", weight_shape);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  TORCH_CHECK_VALUE(groups >= 1 && weight_shape[0] % groups == 0, op,
                    ": groups must be >= 1 and divide C_out = ", weight_shape[0], ", got ", groups);
  TORCH_CHECK_VALUE(groups < kLargestExtent, op, ": groups must be below 2^31, got ", groups);
  return {weight_shape[0],
          weight_shape[1],
          {weight_shape[2], weight_shape[3]},
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]},
          groups};
}

inline void check_type(const char* op, const char* name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16, op, ": ", name,
                   " must be float32, float64 or bfloat16, got ", dtype_name(type));
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, op, ": ", name, " must be a dense (strided) tensor, got layout ",
                   tensor.layout());
}

// `tensor` like `first`, the op's first argument, in device and dtype.
inline void check_alike(const char* op, const char* name, const at::Tensor& tensor, const char* first_name,
                        const at::Tensor& first) {
  TORCH_CHECK_VALUE(tensor.device() == first.device(), op, ": ", name, " must be on ", first.device(), " like ",
                    first_name, ", got ", tensor.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == first.scalar_type(), op, ": ", name, " must be ",
                   dtype_name(first.scalar_type()), " like ", first_name, ", got ", dtype_name(tensor.scalar_type()));
}

inline void check_indices(const char* op, const at::Tensor& indices, const char* first_name, const at::Tensor& first) {
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong, op, ": indices must be int64, got ",
                   dtype_name(indices.scalar_type()));
  TORCH_CHECK_VALUE(indices.dim() == 1, op, ": indices must be [nnz], got ", indices.sym_sizes());
  TORCH_CHECK_VALUE(indices.device() == first.device(), op, ": indices must be on ", first.device(), " like ",
                    first_name, ", got ", indices.device());
}

inline void check_values(const char* op, const at::Tensor& values, const at::Tensor& indices, const char* first_name,
                         const at::Tensor& first) {
  check_alike(op, "values", values, first_name, first);
  TORCH_CHECK_VALUE(values.dim() == 1 && values.sym_size(0) == indices.sym_size(0), op, ": values must be [",
                    indices.sym_size(0), "] like indices, got ", values.sym_sizes());
}

// Checks the input's sizes [N, C_in, H, W]; returns those of the output.
inline std::array<c10::SymInt, 4> check_input_size(const char* op, const char* name, const ConvWeight& weight,
                                                   c10::SymIntArrayRef size) {
  TORCH_CHECK_VALUE(size.size() == 4 && size[1] == weight.channels_in(), op, ": ", name,
                    " must be [N, C_in, H, W] with C_in == ", weight.channels_in(),
                    " (from weight_shape and groups), got ", size);
  std::array<c10::SymInt, 4> out{size[0], weight.channels_out, 0, 0};
  for (int axis = 0; axis < 2; ++axis) {
    const c10::SymInt& input = size[2 + axis];
    const std::int64_t reach = weight.dilation[axis] * (weight.kernel[axis] - 1) + 1;
    TORCH_CHECK_VALUE(input + 2 * weight.padding[axis] >= reach, op, ": ", name, " must be at least ",
                      reach - 2 * weight.padding[axis], axis == 0 ? " high" : " wide",
                      " for this kernel, dilation and padding, got ", size);
    out[2 + axis] = output_size(weight, input, axis);
  }
  return out;
}

inline void check_gradient(const char* op, const at::Tensor& grad, const std::array<c10::SymInt, 4>& out) {
  TORCH_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(out), op, ": grad must be ", c10::SymIntArrayRef(out),
                    " (the output's shape), got ", grad.sym_sizes());
}

// ---- one function per op: all checks; what they worked out
struct CheckedConv {
  ConvWeight weight;
  std::array<c10::SymInt, 4> out_size;
};

inline CheckedConv check_forward(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                                 const OptionalTensor& bias, CURVLAB_CONV_PARAMETERS) {
  constexpr const char* op = "masked_conv2d";
  check_type(op, "x", x);
  const ConvWeight weight = conv_weight(op, CURVLAB_CONV_ARGUMENTS);
  check_indices(op, indices, "x", x);
  check_values(op, values, indices, "x", x);
  if (given(bias)) {
    check_alike(op, "bias", *bias, "x", x);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == weight.channels_out, op, ": bias must be [",
                      weight.channels_out, "] (C_out of weight_shape), got ", bias->sym_sizes());
  }
  return {weight, check_input_size(op, "x", weight, x.sym_sizes())};
}

inline CheckedConv check_input(const at::Tensor& grad, const at::Tensor& values, const at::Tensor& indices,
                               c10::SymIntArrayRef input_size, CURVLAB_CONV_PARAMETERS) {
  constexpr const char* op = "masked_conv2d_input";
  check_type(op, "grad", grad);
  const ConvWeight weight = conv_weight(op, CURVLAB_CONV_ARGUMENTS);
  check_indices(op, indices, "grad", grad);
  check_values(op, values, indices, "grad", grad);
  const CheckedConv checked{weight, check_input_size(op, "input_size", weight, input_size)};
  check_gradient(op, grad, checked.out_size);
  return checked;
}

inline CheckedConv check_pair_of_data(const char* op, const at::Tensor& x, const at::Tensor& grad,
                                      const at::Tensor& indices, CURVLAB_CONV_PARAMETERS) {
  check_type(op, "x", x);
  const ConvWeight weight = conv_weight(op, CURVLAB_CONV_ARGUMENTS);
  check_indices(op, indices, "x", x);
  check_alike(op, "grad", grad, "x", x);
  const CheckedConv checked{weight, check_input_size(op, "x", weight, x.sym_sizes())};
  check_gradient(op, grad, checked.out_size);
  return checked;
}

inline CheckedConv check_weight(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& indices,
                                CURVLAB_CONV_PARAMETERS) {
  return check_pair_of_data("masked_conv2d_weight", x, grad, indices, CURVLAB_CONV_ARGUMENTS);
}

inline CheckedConv check_backward(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& values,
                                  const at::Tensor& indices, CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked = check_pair_of_data("masked_conv2d_backward", x, grad, indices, CURVLAB_CONV_ARGUMENTS);
  check_values("masked_conv2d_backward", values, indices, "x", x);
  return checked;
}

}  // namespace curvlab::sparse_conv
