// SPDX-License-Identifier: Apache-2.0
// Every op of curvlab, one line each with its formula: the table of contents. The folders hold the implementations.
#include <torch/library.h>

#include "common/python_module.h"

TORCH_LIBRARY(curvlab, m) {
  // norms/: [T + 1, 7] per tensor and global: sum|x|, |x|_2, max|x|, #{x != 0}, |x - r|_2, <x, r>, |r|_2
  m.def("multi_tensor_norms(Tensor[] tensors, Tensor[] reference, bool l2_only=False) -> Tensor");
  // norms/: |w[j]|_2 of every slice along the first dimension, the tensors one after another
  m.def("filter_norms(Tensor[] tensors) -> Tensor");
  // hvp/: first = phi'(z), second = phi''(z) delta
  m.def(
      "activation_factors(Tensor z, Tensor? delta, str kind, float slope, float beta, float threshold, "
      "Tensor(a!) first, Tensor(b!)? second) -> ()");
  // hvp/: out = first (scale (a + b) + gain centered + bias + residual), dot = sum_r delta (a + b)
  m.def(
      "tangent_forward(Tensor a, Tensor? b, Tensor? bias, Tensor? scale, Tensor? gain, Tensor? centered, "
      "Tensor? residual, Tensor? first, Tensor? delta, Tensor(a!) out, Tensor(b!)? pre, Tensor(c!)? dot) -> ()");
  // hvp/: gy = first (g + g2) + second pre, gt = scale gy + gain delta, and the sums of gy and of gy centered over rows
  m.def(
      "tangent_backward(Tensor g, Tensor? g2, Tensor? first, Tensor? second, Tensor? pre, Tensor? scale, Tensor? gain, "
      "Tensor? delta, Tensor? centered, Tensor? t, Tensor? dot, Tensor? inv_std, Tensor(a!)? gy, Tensor(b!)? gt, "
      "Tensor(c!)? bias_sum, Tensor(d!)? gain_sum, bool accumulate) -> ()");
  // hvp/: out[k, n, r, c] = x[k, n, index[n, r, c], c], and its adjoint
  m.def("pool_gather(Tensor x, Tensor index, Tensor(a!) out) -> ()");
  m.def("pool_scatter(Tensor g, Tensor index, Tensor(a!) out, bool unique) -> ()");
  // hvp/: out[k, n, r, o] = bias[k, o] + sum_c,i,j w[k, o, c, i, j] x[n, position + (i, j), c], and the derivative by w
  m.def(
      "first_conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? choice, int stride_height, int stride_width, "
      "Tensor(a!) out) -> ()");
  m.def(
      "first_conv_weight(Tensor g, Tensor x, Tensor? choice, int stride_height, int stride_width, Tensor(a!) out, "
      "bool accumulate) -> ()");
  // hvp/: out = weight (diag p - p p^T) u
  m.def("softmax_hessian_product(Tensor p, Tensor label, Tensor weight, Tensor u, Tensor(a!) out) -> ()");
  // sparse_conv/: out = w * x + bias, w zero but for `values` at the flat positions `indices` of weight_shape
  m.def(
      "masked_conv2d(Tensor x, Tensor values, Tensor indices, Tensor? bias, int[] weight_shape, int[] stride, "
      "int[] padding, int[] dilation, int groups) -> Tensor");
  // sparse_conv/: the derivative of <grad, w * x> by x, and by the values
  m.def(
      "masked_conv2d_input(Tensor grad, Tensor values, Tensor indices, SymInt[] input_size, int[] weight_shape, "
      "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
  m.def(
      "masked_conv2d_weight(Tensor x, Tensor grad, Tensor indices, int[] weight_shape, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> Tensor");
  // sparse_conv/: both of them, and the sum of grad over images and positions (the derivative by the bias)
  m.def(
      "masked_conv2d_backward(Tensor x, Tensor grad, Tensor values, Tensor indices, int[] weight_shape, int[] stride, "
      "int[] padding, int[] dilation, int groups) -> (Tensor, Tensor, Tensor)");
  // norm_act/: relu((x - mean) inv_std weight + bias), with `pool` its maximum over 2 x 2 windows; mean and inv_std
  m.def(
      "batch_norm_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "bool training, float momentum, float eps, bool pool) -> (Tensor, Tensor, Tensor)");
  // norm_act/: the gradients by x, weight and bias
  m.def(
      "batch_norm_relu_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor inv_std, "
      "bool training, bool pool) -> (Tensor, Tensor, Tensor)");
  // common/: the instruction set whose CPU kernels run
  m.def("cpu_capability() -> str");
}

CURVLAB_PYTHON_MODULE(_C)
