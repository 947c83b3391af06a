// SPDX-License-Identifier: Apache-2.0
#include "common/launch.cuh"
#include "hvp/activation_factors_cuda.h"
#include "hvp/activation_factors_kernel.cuh"

namespace curvlab::hvp {
namespace {

template <Activation kind, class scalar_t>
const char* launch(const ActivationArguments& x, int multiprocessors, cudaStream_t stream) {
  const unsigned grid = grid_for(ceil_div(x.elements, kBlockSize), kActivationBlocksPerMultiprocessor, multiprocessors);
  CURVLAB_LAUNCH((activation_factors_kernel<scalar_t, kind>), grid, kBlockSize, 0, stream, x);
  return launch_error();
}

template <Activation kind>
const char* launch(const ActivationArguments& x, int multiprocessors, cudaStream_t stream) {
  switch (x.type) {
    case kFloat64:
      return launch<kind, double>(x, multiprocessors, stream);
    case kBFloat16:
      return launch<kind, BFloat16Bits>(x, multiprocessors, stream);
    default:
      return launch<kind, float>(x, multiprocessors, stream);
  }
}

}  // namespace

const char* launch_activation_factors(const ActivationArguments& x, int multiprocessors, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (x.elements == 0) return nullptr;
  switch (x.kind) {
    case Activation::kRelu:
      return launch<Activation::kRelu>(x, multiprocessors, stream);
    case Activation::kLeakyRelu:
      return launch<Activation::kLeakyRelu>(x, multiprocessors, stream);
    case Activation::kTanh:
      return launch<Activation::kTanh>(x, multiprocessors, stream);
    case Activation::kSigmoid:
      return launch<Activation::kSigmoid>(x, multiprocessors, stream);
    case Activation::kSoftplus:
      return launch<Activation::kSoftplus>(x, multiprocessors, stream);
    case Activation::kGelu:
      return launch<Activation::kGelu>(x, multiprocessors, stream);
    case Activation::kGeluTanh:
      return launch<Activation::kGeluTanh>(x, multiprocessors, stream);
    default:
      return launch<Activation::kSilu>(x, multiprocessors, stream);
  }
}

}  // namespace curvlab::hvp
