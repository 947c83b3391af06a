// SPDX-License-Identifier: Apache-2.0
// The ops of the family as C++ functions that go through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "sparse_conv/arguments.h"

namespace curvlab::sparse_conv {

at::Tensor masked_conv2d(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                         const OptionalTensor& bias, CURVLAB_CONV_PARAMETERS);
at::Tensor masked_conv2d_input(const at::Tensor& grad, const at::Tensor& values, const at::Tensor& indices,
                               c10::SymIntArrayRef input_size, CURVLAB_CONV_PARAMETERS);
at::Tensor masked_conv2d_weight(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& indices,
                                CURVLAB_CONV_PARAMETERS);
// Both gradients of masked_conv2d, which share the work of bringing grad into the kernels' layout. No derivative.
std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_conv2d_backward(const at::Tensor& x, const at::Tensor& grad,
                                                                      const at::Tensor& values,
                                                                      const at::Tensor& indices,
                                                                      CURVLAB_CONV_PARAMETERS);

}  // namespace curvlab::sparse_conv
