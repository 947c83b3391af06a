// SPDX-License-Identifier: Apache-2.0
// Derivatives of the masked convolutions: each op's are the other two.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "common/no_gradient.h"
#include "sparse_conv/dispatch.h"

namespace curvlab::sparse_conv {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Geometry {
  std::vector<std::int64_t> weight_shape, stride, padding, dilation;
  std::int64_t groups;
};

void save(AutogradContext* context, const Geometry& geometry) {
  context->saved_data["weight_shape"] = geometry.weight_shape;
  context->saved_data["stride"] = geometry.stride;
  context->saved_data["padding"] = geometry.padding;
  context->saved_data["dilation"] = geometry.dilation;
  context->saved_data["groups"] = geometry.groups;
}

Geometry saved_geometry(AutogradContext* context) {
  auto& data = context->saved_data;
  return {data["weight_shape"].toIntVector(), data["stride"].toIntVector(), data["padding"].toIntVector(),
          data["dilation"].toIntVector(), data["groups"].toInt()};
}

#define CURVLAB_GEOMETRY(g) g.weight_shape, g.stride, g.padding, g.dilation, g.groups

struct ConvFunction : torch::autograd::Function<ConvFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& values,
                            const at::Tensor& indices, const OptionalTensor& bias, const Geometry& geometry) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, values, indices});
    context->saved_data["bias"] = given(bias);  // an absent one has no edge to ask about
    save(context, geometry);
    return masked_conv2d(x, values, indices, bias, CURVLAB_GEOMETRY(geometry));
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &values = saved[1], &indices = saved[2], &grad = grads[0];
    const Geometry geometry = saved_geometry(context);
    variable_list out(5);
    if (!grad.defined()) return out;
    const bool wants_x = context->needs_input_grad(0), wants_values = context->needs_input_grad(1);
    const bool wants_bias = context->saved_data["bias"].toBool() && context->needs_input_grad(3);
    if (wants_x && wants_values && !at::GradMode::is_enabled()) {
      std::tie(out[0], out[1], out[3]) = masked_conv2d_backward(x, grad, values, indices, CURVLAB_GEOMETRY(geometry));
      if (!wants_bias) out[3] = at::Tensor();
    } else {
      if (wants_x) {
        out[0] = masked_conv2d_input(grad, values, indices, x.sym_sizes(), CURVLAB_GEOMETRY(geometry));
      }
      if (wants_values) out[1] = masked_conv2d_weight(x, grad, indices, CURVLAB_GEOMETRY(geometry));
    }
    if (wants_bias && !out[3].defined()) out[3] = grad.sum({0, 2, 3});
    return out;
  }
};

struct InputFunction : torch::autograd::Function<InputFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& grad, const at::Tensor& values,
                            const at::Tensor& indices, c10::SymIntArrayRef input_size, const Geometry& geometry) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({grad, values, indices});
    save(context, geometry);
    return masked_conv2d_input(grad, values, indices, input_size, CURVLAB_GEOMETRY(geometry));
  }

  // The op is linear in both, and adjoint to masked_conv2d: <a, input(g, v)> = <conv(a, v), g>.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &grad = saved[0], &values = saved[1], &indices = saved[2], &a = grads[0];
    const Geometry geometry = saved_geometry(context);
    variable_list out(5);
    if (!a.defined()) return out;
    if (context->needs_input_grad(0)) {
      out[0] = masked_conv2d(a, values, indices, std::nullopt, CURVLAB_GEOMETRY(geometry));
    }
    if (context->needs_input_grad(1)) {
      out[1] = masked_conv2d_weight(a, grad, indices, CURVLAB_GEOMETRY(geometry));
    }
    return out;
  }
};

struct WeightFunction : torch::autograd::Function<WeightFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& grad,
                            const at::Tensor& indices, const Geometry& geometry) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, grad, indices});
    save(context, geometry);
    return masked_conv2d_weight(x, grad, indices, CURVLAB_GEOMETRY(geometry));
  }

  // <b, weight(x, g)> = <conv(x, b), g> = <x, input(g, b)>.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &grad = saved[1], &indices = saved[2], &b = grads[0];
    const Geometry geometry = saved_geometry(context);
    variable_list out(4);
    if (!b.defined()) return out;
    if (context->needs_input_grad(0)) {
      out[0] = masked_conv2d_input(grad, b, indices, x.sym_sizes(), CURVLAB_GEOMETRY(geometry));
    }
    if (context->needs_input_grad(1)) {
      out[1] = masked_conv2d(x, b, indices, std::nullopt, CURVLAB_GEOMETRY(geometry));
    }
    return out;
  }
};

Geometry geometry_of(CURVLAB_CONV_PARAMETERS) {
  return {weight_shape.vec(), stride.vec(), padding.vec(), dilation.vec(), groups};
}

at::Tensor masked_conv2d_autograd(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                                  const OptionalTensor& bias, CURVLAB_CONV_PARAMETERS) {
  return ConvFunction::apply(x, values, indices, bias, geometry_of(CURVLAB_CONV_ARGUMENTS));
}

at::Tensor masked_conv2d_input_autograd(const at::Tensor& grad, const at::Tensor& values, const at::Tensor& indices,
                                        c10::SymIntArrayRef input_size, CURVLAB_CONV_PARAMETERS) {
  return InputFunction::apply(grad, values, indices, input_size, geometry_of(CURVLAB_CONV_ARGUMENTS));
}

at::Tensor masked_conv2d_weight_autograd(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& indices,
                                         CURVLAB_CONV_PARAMETERS) {
  return WeightFunction::apply(x, grad, indices, geometry_of(CURVLAB_CONV_ARGUMENTS));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_conv2d_backward_autograd(const at::Tensor& x,
                                                                               const at::Tensor& grad,
                                                                               const at::Tensor& values,
                                                                               const at::Tensor& indices,
                                                                               CURVLAB_CONV_PARAMETERS) {
  refuse_gradient("masked_conv2d_backward", {&x, &grad, &values});
  const at::AutoDispatchBelowADInplaceOrView below;
  return masked_conv2d_backward(x, grad, values, indices, CURVLAB_CONV_ARGUMENTS);
}

}  // namespace
}  // namespace curvlab::sparse_conv

TORCH_LIBRARY_IMPL(curvlab, Autograd, m) {
  m.impl("masked_conv2d", TORCH_FN(curvlab::sparse_conv::masked_conv2d_autograd));
  m.impl("masked_conv2d_input", TORCH_FN(curvlab::sparse_conv::masked_conv2d_input_autograd));
  m.impl("masked_conv2d_weight", TORCH_FN(curvlab::sparse_conv::masked_conv2d_weight_autograd));
  m.impl("masked_conv2d_backward", TORCH_FN(curvlab::sparse_conv::masked_conv2d_backward_autograd));
}
