// SPDX-License-Identifier: Apache-2.0
// The ops through the dispatcher, and their fake kernels.
#include "sparse_conv/dispatch.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace curvlab::sparse_conv {

namespace {

template <class Function>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

at::Tensor masked_conv2d_meta(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                              const OptionalTensor& bias, CURVLAB_CONV_PARAMETERS) {
  return at::empty_symint(check_forward(x, values, indices, bias, CURVLAB_CONV_ARGUMENTS).out_size, x.options());
}

at::Tensor masked_conv2d_input_meta(const at::Tensor& grad, const at::Tensor& values, const at::Tensor& indices,
                                    c10::SymIntArrayRef input_size, CURVLAB_CONV_PARAMETERS) {
  check_input(grad, values, indices, input_size, CURVLAB_CONV_ARGUMENTS);
  return at::empty_symint(input_size, grad.options());
}

at::Tensor masked_conv2d_weight_meta(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& indices,
                                     CURVLAB_CONV_PARAMETERS) {
  check_weight(x, grad, indices, CURVLAB_CONV_ARGUMENTS);
  return at::empty_symint({indices.sym_size(0)}, x.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_conv2d_backward_meta(const at::Tensor& x, const at::Tensor& grad,
                                                                           const at::Tensor& values,
                                                                           const at::Tensor& indices,
                                                                           CURVLAB_CONV_PARAMETERS) {
  check_backward(x, grad, values, indices, CURVLAB_CONV_ARGUMENTS);
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint({indices.sym_size(0)}, x.options()),
          at::empty_symint({grad.sym_size(1)}, x.options())};
}

}  // namespace

at::Tensor masked_conv2d(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                         const OptionalTensor& bias, CURVLAB_CONV_PARAMETERS) {
  static const auto op = find_op<decltype(masked_conv2d)>("curvlab::masked_conv2d");
  return op.call(x, values, indices, bias, CURVLAB_CONV_ARGUMENTS);
}

at::Tensor masked_conv2d_input(const at::Tensor& grad, const at::Tensor& values, const at::Tensor& indices,
                               c10::SymIntArrayRef input_size, CURVLAB_CONV_PARAMETERS) {
  static const auto op = find_op<decltype(masked_conv2d_input)>("curvlab::masked_conv2d_input");
  return op.call(grad, values, indices, input_size, CURVLAB_CONV_ARGUMENTS);
}

at::Tensor masked_conv2d_weight(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& indices,
                                CURVLAB_CONV_PARAMETERS) {
  static const auto op = find_op<decltype(masked_conv2d_weight)>("curvlab::masked_conv2d_weight");
  return op.call(x, grad, indices, CURVLAB_CONV_ARGUMENTS);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_conv2d_backward(const at::Tensor& x, const at::Tensor& grad,
                                                                      const at::Tensor& values,
                                                                      const at::Tensor& indices,
                                                                      CURVLAB_CONV_PARAMETERS) {
  static const auto op = find_op<decltype(masked_conv2d_backward)>("curvlab::masked_conv2d_backward");
  return op.call(x, grad, values, indices, CURVLAB_CONV_ARGUMENTS);
}

}  // namespace curvlab::sparse_conv

TORCH_LIBRARY_IMPL(curvlab, Meta, m) {
  m.impl("masked_conv2d", curvlab::sparse_conv::masked_conv2d_meta);
  m.impl("masked_conv2d_input", curvlab::sparse_conv::masked_conv2d_input_meta);
  m.impl("masked_conv2d_weight", curvlab::sparse_conv::masked_conv2d_weight_meta);
  m.impl("masked_conv2d_backward", curvlab::sparse_conv::masked_conv2d_backward_meta);
}
