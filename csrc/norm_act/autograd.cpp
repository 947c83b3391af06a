// SPDX-License-Identifier: Apache-2.0
// Derivatives of batch_norm_relu: the first by its own kernel; where a graph of it is wanted, through ATen's functions
// one after another, which have derivatives of every order.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/relu.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "common/no_gradient.h"
#include "norm_act/dispatch.h"

namespace curvlab::norm_act {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What autograd need not look at.
struct Options {
  OptionalTensor running_mean, running_var;
  bool training;
  double momentum, eps;
  bool pool;
};

at::Tensor per_channel(const at::Tensor& values) { return values.view({1, -1, 1, 1}); }

at::Tensor composition(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       const at::Tensor& mean, const at::Tensor& inv_std) {
  at::Tensor z;
  if (context->saved_data["training"].toBool()) {
    z = at::batch_norm(x, weight, bias, {}, {}, true, 0.0, context->saved_data["eps"].toDouble(), false);
  } else {
    z = x.sub(per_channel(mean.to(x.scalar_type()))).mul(per_channel(inv_std.to(x.scalar_type())));
    if (weight.defined()) z = z.mul(per_channel(weight));
    if (bias.defined()) z = z.add(per_channel(bias));
  }
  const at::Tensor out = at::relu(z);
  return context->saved_data["pool"].toBool() ? at::max_pool2d(out, {2, 2}) : out;
}

struct NormFunction : torch::autograd::Function<NormFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, mean, inv_std] = batch_norm_relu(x, weight, bias, options.running_mean, options.running_var,
                                                options.training, options.momentum, options.eps, options.pool);
    context->save_for_backward(
        {x, given(weight) ? *weight : at::Tensor(), given(bias) ? *bias : at::Tensor(), mean, inv_std});
    context->saved_data["training"] = options.training;
    context->saved_data["eps"] = options.eps;
    context->saved_data["pool"] = options.pool;
    context->mark_non_differentiable({mean, inv_std});
    return {out, mean, inv_std};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    variable_list out(4);
    if (!grads[0].defined()) return out;
    if (at::GradMode::is_enabled()) return backward_with_graph(context, saved, grads[0]);
    std::tie(out[0], out[1], out[2]) =
        batch_norm_relu_backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                                 context->saved_data["training"].toBool(), context->saved_data["pool"].toBool());
    for (int i = 1; i < 3; ++i) {
      if (!saved[i].defined()) out[i] = at::Tensor();
    }
    return out;
  }

  static variable_list backward_with_graph(AutogradContext* context, const variable_list& saved,
                                           const at::Tensor& grad) {
    variable_list given_inputs(3), wanted, out(4);
    std::vector<std::size_t> places;
    std::size_t edge = 0;  // an absent input has no edge to ask about
    for (std::size_t i = 0; i < 3; ++i) {
      if (!saved[i].defined()) continue;
      // Under names of their own: where one input depends on another, its path through that one is not ours to follow.
      given_inputs[i] = at::alias(saved[i]);
      if (!context->needs_input_grad(edge++)) continue;
      wanted.push_back(given_inputs[i]);
      places.push_back(i);
    }
    const at::Tensor result =
        composition(context, given_inputs[0], given_inputs[1], given_inputs[2], saved[3], saved[4]);
    const variable_list found = torch::autograd::grad({result}, wanted, {grad}, /*retain_graph=*/true,
                                                      /*create_graph=*/true, /*allow_unused=*/false);
    for (std::size_t i = 0; i < places.size(); ++i) out[places[i]] = found[i];
    return out;
  }
};

ThreeTensors batch_norm_relu_autograd(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                      bool training, double momentum, double eps, bool pool) {
  const variable_list out =
      NormFunction::apply(x, weight, bias, Options{running_mean, running_var, training, momentum, eps, pool});
  return {out[0], out[1], out[2]};
}

ThreeTensors batch_norm_relu_backward_autograd(const at::Tensor& grad, const at::Tensor& x,
                                               const OptionalTensor& weight, const OptionalTensor& bias,
                                               const at::Tensor& mean, const at::Tensor& inv_std, bool training,
                                               bool pool) {
  const at::Tensor absent;
  refuse_gradient("batch_norm_relu_backward",
                  {&grad, &x, given(weight) ? &*weight : &absent, given(bias) ? &*bias : &absent, &mean, &inv_std});
  const at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm_relu_backward(grad, x, weight, bias, mean, inv_std, training, pool);
}

}  // namespace
}  // namespace curvlab::norm_act

TORCH_LIBRARY_IMPL(curvlab, Autograd, m) {
  m.impl("batch_norm_relu", TORCH_FN(curvlab::norm_act::batch_norm_relu_autograd));
  m.impl("batch_norm_relu_backward", TORCH_FN(curvlab::norm_act::batch_norm_relu_backward_autograd));
}
