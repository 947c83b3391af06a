// SPDX-License-Identifier: Apache-2.0
#include "common/launch.cuh"
#include "sparse_conv/masked_conv2d_cuda.h"
#include "sparse_conv/masked_conv2d_kernel.cuh"
#include "sparse_conv/masked_conv2d_weight_kernel.cuh"

namespace curvlab::sparse_conv {
namespace {

constexpr std::int64_t kLargestGridX = 0x7fffffff;  // kernels loop over what is beyond
constexpr int kSharedWithoutAsking = 48 * 1024;

unsigned grid_of(std::int64_t blocks) { return static_cast<unsigned>(smaller(blocks, kLargestGridX)); }

template <class Kernel>
const char* allow_shared(Kernel kernel, int bytes) {
  if (bytes <= kSharedWithoutAsking) return nullptr;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // else the next check of anybody would report it again
  return cudaGetErrorString(error);
}

template <class scalar_t>
const char* gather(const GatherArguments& x, cudaStream_t stream) {
  if (!x.windowed) {
    const std::int64_t blocks = x.channel_tiles(kWarps) * direct_slices(x) * x.phase_count();
    CURVLAB_LAUNCH(gather_direct_kernel<scalar_t>, grid_of(blocks), kBlockSize, 0, stream, x);
    return launch_error();
  }
  if (const char* error = allow_shared(gather_windows_kernel<scalar_t>, x.shared_bytes)) return error;
  const std::int64_t blocks = x.channel_tiles(kBlockChannels) * x.image_blocks() * x.position_tiles() * x.phase_count();
  CURVLAB_LAUNCH(gather_windows_kernel<scalar_t>, grid_of(blocks), kBlockSize, x.shared_bytes, stream, x);
  return launch_error();
}

template <class scalar_t>
const char* permute(const void* values, const std::int32_t* source, std::int64_t count, void* permuted,
                    cudaStream_t stream) {
  CURVLAB_LAUNCH(permute_values_kernel<scalar_t>, grid_of(ceil_div(count, kBlockSize)), kBlockSize, 0, stream,
                 static_cast<const scalar_t*>(values), source, count, static_cast<scalar_t*>(permuted));
  return launch_error();
}

template <class scalar_t>
const char* weight_gradient(const GatherArguments& x, int splits, void* workspace, void* dvalues, cudaStream_t stream) {
  using acc_t = typename Held<scalar_t>::type;
  acc_t* partial = static_cast<acc_t*>(workspace);
  if (x.images * x.out_plane() == 0) {
    splits = 0;  // no row is written, and the kernels divide by the plane: sums over nothing are zeros
  } else if (x.windowed) {
    if (const char* error = allow_shared(weight_windows_kernel<scalar_t>, x.shared_bytes)) return error;
    CURVLAB_LAUNCH(weight_windows_kernel<scalar_t>, grid_of(x.channel_tiles(kBlockChannels) * splits), kBlockSize,
                   x.shared_bytes, stream, x, splits, partial);
  } else {
    const std::int64_t blocks = static_cast<std::int64_t>(x.groups) * x.out_channels * splits;
    CURVLAB_LAUNCH(weight_direct_kernel<scalar_t>, grid_of(blocks), kBlockSize, 0, stream, x, splits, partial);
  }
  if (const char* error = launch_error()) return error;
  CURVLAB_LAUNCH(weight_finish_kernel<scalar_t>, grid_of(ceil_div(x.nonzeros, kFinishTaps)), kBlockSize, 0, stream,
                 static_cast<const acc_t*>(partial), splits, x.nonzeros, static_cast<scalar_t*>(dvalues));
  return launch_error();
}

}  // namespace

const char* launch_gather(const GatherArguments& x, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (x.images * x.out_image() == 0) return nullptr;
  switch (x.type) {
    case kFloat64:
      return gather<double>(x, stream);
    case kBFloat16:
      return gather<BFloat16Bits>(x, stream);
    default:
      return gather<float>(x, stream);
  }
}

const char* launch_permute_values(const void* values, const std::int32_t* source, std::int64_t count, std::int32_t type,
                                  void* permuted, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (count == 0) return nullptr;
  switch (type) {
    case kFloat64:
      return permute<double>(values, source, count, permuted, stream);
    case kBFloat16:
      return permute<BFloat16Bits>(values, source, count, permuted, stream);
    default:
      return permute<float>(values, source, count, permuted, stream);
  }
}

const char* launch_weight_gradient(const GatherArguments& x, int splits, void* workspace, void* dvalues,
                                   void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (x.nonzeros == 0) return nullptr;
  switch (x.type) {
    case kFloat64:
      return weight_gradient<double>(x, splits, workspace, dvalues, stream);
    case kBFloat16:
      return weight_gradient<BFloat16Bits>(x, splits, workspace, dvalues, stream);
    default:
      return weight_gradient<float>(x, splits, workspace, dvalues, stream);
  }
}

}  // namespace curvlab::sparse_conv
