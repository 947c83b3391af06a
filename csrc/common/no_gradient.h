// SPDX-License-Identifier: Apache-2.0
// Autograd kernels of ops that have no derivative: a gradient that is asked for is an error, never a silent zero. What
// autogradNotImplementedFallback does, without boxing the arguments: for 200 tensors that took 5 us, a third of a call.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace curvlab {

// Throws if an input carries a forward-mode tangent.
void refuse_tangents(const char* op, std::initializer_list<at::TensorList> inputs);

// If an input requires a gradient (and gradients are on), gives `out` a backward that throws.
void refuse_backward(const char* op, std::initializer_list<at::TensorList> inputs, const at::Tensor& out);

// For ops that write into their arguments: throws if an input (null: none) requires a gradient while gradients are on,
// or carries a forward-mode tangent.
void refuse_gradient(const char* op, std::initializer_list<const at::Tensor*> inputs);

// Calls `op_below` below autograd.
template <class OpBelow>
at::Tensor without_gradient(const char* op, std::initializer_list<at::TensorList> inputs, const OpBelow& op_below) {
  refuse_tangents(op, inputs);
  at::Tensor out;
  {
    const at::AutoDispatchBelowAutograd below;
    out = op_below();
  }
  refuse_backward(op, inputs, out);
  return out;
}

}  // namespace curvlab
