// SPDX-License-Identifier: Apache-2.0
#include "common/launch.cuh"
#include "hvp/softmax_hessian_cuda.h"
#include "hvp/softmax_hessian_kernel.cuh"

namespace curvlab::hvp {
namespace {

template <class scalar_t>
const char* launch(const SoftmaxArguments& x, int multiprocessors, cudaStream_t stream) {
  const std::int64_t blocks = ceil_div(x.directions * x.samples, kSoftmaxWarps);
  const unsigned grid = grid_for(blocks, kSoftmaxBlocksPerMultiprocessor, multiprocessors);
  CURVLAB_LAUNCH(softmax_hessian_kernel<scalar_t>, grid, kBlockSize, 0, stream, x);
  return launch_error();
}

}  // namespace

const char* launch_softmax_hessian(const SoftmaxArguments& x, int multiprocessors, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (x.directions * x.samples * x.classes == 0) return nullptr;
  switch (x.type) {
    case kFloat64:
      return launch<double>(x, multiprocessors, stream);
    case kBFloat16:
      return launch<BFloat16Bits>(x, multiprocessors, stream);
    default:
      return launch<float>(x, multiprocessors, stream);
  }
}

}  // namespace curvlab::hvp
