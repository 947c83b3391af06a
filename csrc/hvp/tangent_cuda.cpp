// SPDX-License-Identifier: Apache-2.0
// tangent_forward and tangent_backward on CUDA: from tensors to the launchers.
#include "hvp/tangent_cuda.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "common/cuda_device.h"
#include "hvp/tangent_arguments.h"

namespace curvlab::hvp {
namespace {

SumsTo sums_to(const OptionalTensor& out) {
  return given(out) ? SumsTo{out->mutable_data_ptr(), out->stride(0)} : SumsTo{nullptr, 0};
}

template <class Arguments>
at::Tensor workspace_for(const Arguments& arguments, int sums, const at::Tensor& like) {
  if (sums == 0 || like.numel() == 0) return {};
  const std::int64_t doubles = workspace_doubles(arguments.shape, tile_of(arguments, sums), sums);
  return at::empty({doubles}, like.options().dtype(at::kDouble));
}

double* doubles_of(const at::Tensor& workspace) {
  return workspace.defined() ? workspace.mutable_data_ptr<double>() : nullptr;
}

void tangent_forward_cuda(const at::Tensor& a, const OptionalTensor& b, const OptionalTensor& bias,
                          const OptionalTensor& scale, const OptionalTensor& gain, const OptionalTensor& centered,
                          const OptionalTensor& residual, const OptionalTensor& first, const OptionalTensor& delta,
                          const at::Tensor& out, const OptionalTensor& pre, const OptionalTensor& dot) {
  const ForwardTensors tensors{a, b, bias, scale, gain, centered, residual, first, delta, out, pre, dot};
  check(tensors);  // before the guard, which takes no CPU device
  const c10::cuda::CUDAGuard guard(a.device());
  const PreparedForward prepared(tensors);
  const at::Tensor workspace = workspace_for(prepared.arguments, given(dot) ? 1 : 0, a);
  check_launch("tangent_forward", launch_tangent_forward(prepared.arguments, sums_to(dot), doubles_of(workspace),
                                                         c10::cuda::getCurrentCUDAStream().stream()));
}

void tangent_backward_cuda(const at::Tensor& g, const OptionalTensor& g2, const OptionalTensor& first,
                           const OptionalTensor& second, const OptionalTensor& pre, const OptionalTensor& scale,
                           const OptionalTensor& gain, const OptionalTensor& delta, const OptionalTensor& centered,
                           const OptionalTensor& t, const OptionalTensor& dot, const OptionalTensor& inv_std,
                           const OptionalTensor& gy, const OptionalTensor& gt, const OptionalTensor& bias_sum,
                           const OptionalTensor& gain_sum, bool accumulate) {
  const BackwardTensors tensors{g,        g2, first, second,  pre, scale, gain,     delta,
                                centered, t,  dot,   inv_std, gy,  gt,    bias_sum, gain_sum};
  check(tensors);
  const c10::cuda::CUDAGuard guard(g.device());
  const PreparedBackward prepared(tensors);
  const at::Tensor moved = channels(dot, accumulation_type(g.scalar_type()));
  const at::Tensor workspace = workspace_for(prepared.arguments, given(bias_sum) + given(gain_sum), g);
  check_launch("tangent_backward",
               launch_tangent_backward(prepared.arguments, sums_to(bias_sum), sums_to(gain_sum), channel_rows(moved),
                                       accumulate, doubles_of(workspace), c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace
}  // namespace curvlab::hvp

TORCH_LIBRARY_IMPL(curvlab, CUDA, m) {
  m.impl("tangent_forward", curvlab::hvp::tangent_forward_cuda);
  m.impl("tangent_backward", curvlab::hvp::tangent_backward_cuda);
}
