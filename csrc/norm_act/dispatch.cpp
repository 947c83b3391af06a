// SPDX-License-Identifier: Apache-2.0
// The ops through the dispatcher, and their fake kernels.
#include "norm_act/dispatch.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace curvlab::norm_act {
namespace {

at::Tensor empty_channels(const at::Tensor& x, at::ScalarType type) {
  return at::empty_symint({x.sym_size(1)}, x.options().dtype(type));
}

ThreeTensors batch_norm_relu_meta(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                                  double, double, bool pool) {
  check_forward(x, weight, bias, running_mean, running_var, training, pool);
  return {at::empty_symint(out_size(x, pool), x.options()), empty_channels(x, at::kDouble),
          empty_channels(x, at::kDouble)};
}

ThreeTensors batch_norm_relu_backward_meta(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const at::Tensor& mean,
                                           const at::Tensor& inv_std, bool, bool pool) {
  check_backward(grad, x, weight, bias, mean, inv_std, pool);
  return {at::empty_symint(x.sym_sizes(), x.options()), empty_channels(x, x.scalar_type()),
          empty_channels(x, x.scalar_type())};
}

}  // namespace

ThreeTensors batch_norm_relu(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                             double momentum, double eps, bool pool) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("curvlab::batch_norm_relu", "").typed<decltype(batch_norm_relu)>();
  return op.call(x, weight, bias, running_mean, running_var, training, momentum, eps, pool);
}

ThreeTensors batch_norm_relu_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                      const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& inv_std,
                                      bool training, bool pool) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("curvlab::batch_norm_relu_backward", "")
                             .typed<decltype(batch_norm_relu_backward)>();
  return op.call(grad, x, weight, bias, mean, inv_std, training, pool);
}

}  // namespace curvlab::norm_act

TORCH_LIBRARY_IMPL(curvlab, Meta, m) {
  m.impl("batch_norm_relu", curvlab::norm_act::batch_norm_relu_meta);
  m.impl("batch_norm_relu_backward", curvlab::norm_act::batch_norm_relu_backward_meta);
}
