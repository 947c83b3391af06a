// SPDX-License-Identifier: Apache-2.0
// softmax_hessian_product on CUDA: from tensors to the launcher.
#include "hvp/softmax_hessian_cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "common/cuda_device.h"
#include "hvp/softmax_arguments.h"

namespace curvlab::hvp {
namespace {

void softmax_hessian_cuda(const at::Tensor& p, const at::Tensor& label, const at::Tensor& weight, const at::Tensor& u,
                          const at::Tensor& out) {
  constexpr const char* op = "softmax_hessian_product";
  check_softmax(p, label, weight, u, out);  // before the guard, which takes no CPU device
  const c10::cuda::CUDAGuard guard(u.device());
  check_launch(op, launch_softmax_hessian(softmax_arguments(p, label, weight, u, out), multiprocessors(op),
                                          c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace
}  // namespace curvlab::hvp

TORCH_LIBRARY_IMPL(curvlab, CUDA, m) { m.impl("softmax_hessian_product", curvlab::hvp::softmax_hessian_cuda); }
