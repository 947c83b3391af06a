// SPDX-License-Identifier: Apache-2.0
// activation_factors on CUDA: from tensors to the launcher.
#include "hvp/activation_factors_cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "common/cuda_device.h"
#include "hvp/activation_arguments.h"

namespace curvlab::hvp {
namespace {

void activation_factors_cuda(const at::Tensor& z, const OptionalTensor& delta, std::string_view kind, double slope,
                             double beta, double threshold, const at::Tensor& first, const OptionalTensor& second) {
  constexpr const char* op = "activation_factors";
  const Activation activation = check_activation(z, delta, kind, first, second);  // before the guard
  const c10::cuda::CUDAGuard guard(z.device());
  const ActivationArguments arguments =
      activation_arguments(z, delta, activation, {slope, beta, threshold}, first, second);
  check_launch(op,
               launch_activation_factors(arguments, multiprocessors(op), c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace
}  // namespace curvlab::hvp

TORCH_LIBRARY_IMPL(curvlab, CUDA, m) { m.impl("activation_factors", curvlab::hvp::activation_factors_cuda); }
