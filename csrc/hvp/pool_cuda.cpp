// SPDX-License-Identifier: Apache-2.0
// pool_gather and pool_scatter on CUDA: from tensors to the launchers.
#include "hvp/pool_cuda.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "common/cuda_device.h"
#include "hvp/pool_arguments.h"

namespace curvlab::hvp {
namespace {

void pool_gather_cuda(const at::Tensor& x, const at::Tensor& index, const at::Tensor& out) {
  check_gather(x, index, out);  // before the guard, which takes no CPU device
  if (out.numel() == 0) return;
  check_inputs(x);
  const c10::cuda::CUDAGuard guard(x.device());
  const PoolArguments pool = pool_arguments(x, out, index, x, out, false);
  check_launch("pool_gather", launch_pool_gather(pool, c10::cuda::getCurrentCUDAStream().stream()));
}

void pool_scatter_cuda(const at::Tensor& g, const at::Tensor& index, const at::Tensor& out, bool unique) {
  check_scatter(g, index, out);
  const c10::cuda::CUDAGuard guard(g.device());
  const PoolArguments pool = pool_arguments(out, g, index, g, out, unique);
  at::Tensor scratch;
  if (pool.type == kBFloat16 && !unique) scratch = at::empty({out.numel()}, out.options().dtype(at::kFloat));
  check_launch("pool_scatter",
               launch_pool_scatter(pool, scratch.defined() ? scratch.mutable_data_ptr<float>() : nullptr,
                                   multiprocessors("pool_scatter"), c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace
}  // namespace curvlab::hvp

TORCH_LIBRARY_IMPL(curvlab, CUDA, m) {
  m.impl("pool_gather", curvlab::hvp::pool_gather_cuda);
  m.impl("pool_scatter", curvlab::hvp::pool_scatter_cuda);
}
