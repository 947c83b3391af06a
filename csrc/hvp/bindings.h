// SPDX-License-Identifier: Apache-2.0
// The ops of csrc/hvp as functions of the module _host: the same dispatcher calls as torch.ops.curvlab's, without
// matching Python arguments to a schema (12 arguments: most of a call on a tiny net). For eager code; torch.compile
// traces torch.ops.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>

namespace curvlab::hvp {

using HostOptional = const std::optional<at::Tensor>&;

template <class... Parameters>
struct HostOp {
  c10::TypedOperatorHandle<void(Parameters...)> handle;

  explicit HostOp(const char* name)
      : handle(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<void(Parameters...)>()) {}
};

// Defines `name` with the op's own parameters, by position.
template <class... Parameters>
void bind_op(pybind11::module_& m, const char* name, const char* qualified_name) {
  const HostOp<Parameters...> op(qualified_name);
  m.def(
      name, [op](Parameters... arguments) { op.handle.call(arguments...); },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

inline void bind(pybind11::module_& m) {
  using T = const at::Tensor&;
  using O = HostOptional;
  bind_op<T, O, O, O, O, O, O, O, O, T, O, O>(m, "tangent_forward", "curvlab::tangent_forward");
  bind_op<T, O, O, O, O, O, O, O, O, O, O, O, O, O, O, O, bool>(m, "tangent_backward", "curvlab::tangent_backward");
  bind_op<T, T, T>(m, "pool_gather", "curvlab::pool_gather");
  bind_op<T, T, T, bool>(m, "pool_scatter", "curvlab::pool_scatter");
  using I = std::int64_t;
  bind_op<T, T, O, O, I, I, T>(m, "first_conv_forward", "curvlab::first_conv_forward");
  bind_op<T, T, O, I, I, T, bool>(m, "first_conv_weight", "curvlab::first_conv_weight");
  bind_op<T, T, T, T, T>(m, "softmax_hessian_product", "curvlab::softmax_hessian_product");
}

}  // namespace curvlab::hvp
