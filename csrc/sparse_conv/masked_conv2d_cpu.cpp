// SPDX-License-Identifier: Apache-2.0
// The masked convolutions on the CPU.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "sparse_conv/arguments.h"

namespace curvlab::sparse_conv {
namespace {

at::Tensor dense_weight(const at::Tensor& values, const at::Tensor& indices, at::IntArrayRef shape) {
  at::Tensor weight = at::zeros(shape, values.options());
  weight.view(-1).index_put_({indices}, values);
  return weight;
}

at::Tensor masked_conv2d_cpu(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                             const OptionalTensor& bias, CURVLAB_CONV_PARAMETERS) {
  check_forward(x, values, indices, bias, CURVLAB_CONV_ARGUMENTS);
  return at::convolution(x, dense_weight(values, indices, weight_shape), bias, stride, padding, dilation, false, {0, 0},
                         groups)
      .contiguous();
}

at::Tensor masked_conv2d_input_cpu(const at::Tensor& grad, const at::Tensor& values, const at::Tensor& indices,
                                   at::IntArrayRef input_size, CURVLAB_CONV_PARAMETERS) {
  check_input(grad, values, indices, c10::fromIntArrayRefSlow(input_size), CURVLAB_CONV_ARGUMENTS);
  return std::get<0>(at::convolution_backward(grad, at::empty(input_size, grad.options()),
                                              dense_weight(values, indices, weight_shape), std::nullopt, stride,
                                              padding, dilation, false, {0, 0}, groups, {true, false, false}))
      .contiguous();
}

at::Tensor masked_conv2d_weight_cpu(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& indices,
                                    CURVLAB_CONV_PARAMETERS) {
  check_weight(x, grad, indices, CURVLAB_CONV_ARGUMENTS);
  return std::get<1>(at::convolution_backward(grad, x, at::zeros(weight_shape, x.options()), std::nullopt, stride,
                                              padding, dilation, false, {0, 0}, groups, {false, true, false}))
      .reshape(-1)
      .index({indices});
}

std::tuple<at::Tensor, at::Tensor> masked_conv2d_backward_cpu(const at::Tensor& x, const at::Tensor& grad,
                                                              const at::Tensor& values, const at::Tensor& indices,
                                                              CURVLAB_CONV_PARAMETERS) {
  return {masked_conv2d_input_cpu(grad, values, indices, x.sizes(), CURVLAB_CONV_ARGUMENTS),
          masked_conv2d_weight_cpu(x, grad, indices, CURVLAB_CONV_ARGUMENTS)};
}

}  // namespace
}  // namespace curvlab::sparse_conv

TORCH_LIBRARY_IMPL(curvlab, CPU, m) {
  m.impl("masked_conv2d", curvlab::sparse_conv::masked_conv2d_cpu);
  m.impl("masked_conv2d_input", curvlab::sparse_conv::masked_conv2d_input_cpu);
  m.impl("masked_conv2d_weight", curvlab::sparse_conv::masked_conv2d_weight_cpu);
  m.impl("masked_conv2d_backward", curvlab::sparse_conv::masked_conv2d_backward_cpu);
}
