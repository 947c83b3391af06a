// SPDX-License-Identifier: Apache-2.0
#include "common/no_gradient.h"

#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace curvlab {
namespace {

// torch 2.13 holds nodes by std::shared_ptr, 2.14 by c10::intrusive_ptr.
using NodePointer = decltype(std::declval<torch::autograd::Node&>().getptr());

template <class Pointer>
Pointer make_node(const char* op, torch::autograd::edge_list&& edges) {
  using torch::autograd::NotImplemented;
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<NotImplemented>(op, std::move(edges));
  } else {
    return c10::make_intrusive<NotImplemented>(op, std::move(edges));
  }
}

}  // namespace

void refuse_tangents(const char* op, std::initializer_list<at::TensorList> inputs) {
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr) return;  // one question instead of one a tensor
  for (const at::TensorList& list : inputs) {
    for (const at::Tensor& tensor : list) {
      TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(tensor), op,
                                  ": has no derivative, but an input carries a forward-mode tangent; detach it");
    }
  }
}

void refuse_backward(const char* op, std::initializer_list<at::TensorList> inputs, const at::Tensor& out) {
  if (!at::GradMode::is_enabled()) return;
  torch::autograd::edge_list edges;
  for (const at::TensorList& list : inputs) {
    for (const at::Tensor& tensor : list) {
      if (tensor.requires_grad()) edges.push_back(torch::autograd::impl::gradient_edge(tensor));
    }
  }
  if (edges.empty()) return;
  torch::autograd::set_history(out, make_node<NodePointer>(op, std::move(edges)));
}

void refuse_gradient(const char* op, std::initializer_list<const at::Tensor*> inputs) {
  const bool grad = at::GradMode::is_enabled();
  const bool dual = torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
  if (!grad && !dual) return;
  for (const at::Tensor* tensor : inputs) {
    if (tensor == nullptr || !tensor->defined()) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(!grad || !tensor->requires_grad(), op,
                                ": has no derivative, but an input requires a gradient; detach it or call this under "
                                "torch.no_grad()");
    TORCH_CHECK_NOT_IMPLEMENTED(!dual || !torch::autograd::isFwGradDefined(*tensor), op,
                                ": has no derivative, but an input carries a forward-mode tangent; detach it");
  }
}

}  // namespace curvlab
