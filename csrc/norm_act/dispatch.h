// SPDX-License-Identifier: Apache-2.0
// The ops of the family as C++ functions that go through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "norm_act/arguments.h"

namespace curvlab::norm_act {

using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The result, and float64 [C] mean and 1 / sqrt(variance + eps) that it was normalized with.
ThreeTensors batch_norm_relu(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                             double momentum, double eps, bool pool);

// Gradients by x, weight and bias. No derivative.
ThreeTensors batch_norm_relu_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                      const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& inv_std,
                                      bool training, bool pool);

}  // namespace curvlab::norm_act
