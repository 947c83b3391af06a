// SPDX-License-Identifier: Apache-2.0
#include "common/launch.cuh"
#include "hvp/tangent_backward_kernel.cuh"
#include "hvp/tangent_cuda.h"
#include "hvp/tangent_forward_kernel.cuh"

namespace curvlab::hvp {
namespace {

dim3 grid_of(const Tile& tile, std::int64_t directions) {
  constexpr std::int64_t kLargestGridX = 0x7fffffff;
  return {static_cast<unsigned>(smaller(tile.chunks, kLargestGridX)), static_cast<unsigned>(tile.column_tiles),
          static_cast<unsigned>(smaller(directions, kLargestGridYZ))};
}

const char* launch_finish(const Rows& shape, const FinishArguments& arguments, cudaStream_t stream) {
  const std::int64_t blocks = ceil_div(shape.directions * shape.channels, kFinishColumns);
  if (blocks == 0) return nullptr;
  const auto grid = static_cast<unsigned>(blocks);
  if (shape.type == kFloat64) {
    CURVLAB_LAUNCH(finish_sums_kernel<double>, grid, kBlockSize, 0, stream, arguments);
  } else {
    CURVLAB_LAUNCH(finish_sums_kernel<float>, grid, kBlockSize, 0, stream, arguments);
  }
  return launch_error();
}

template <class scalar_t, int width>
const char* launch_forward(const ForwardArguments& x, const Tile& tile, double* partial, cudaStream_t stream) {
  CURVLAB_LAUNCH((tangent_forward_kernel<scalar_t, width>), grid_of(tile, x.shape.directions), kBlockSize, 0, stream, x,
                 tile, partial);
  return launch_error();
}

template <class scalar_t, int width>
const char* launch_backward(const BackwardArguments& x, const Tile& tile, double* bias, double* gain,
                            cudaStream_t stream) {
  CURVLAB_LAUNCH((tangent_backward_kernel<scalar_t, width>), grid_of(tile, x.shape.directions), kBlockSize, 0, stream,
                 x, tile, bias, gain);
  return launch_error();
}

}  // namespace

const char* launch_tangent_forward(const ForwardArguments& x, const SumsTo& dot, double* workspace,
                                   void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  Tile tile{};
  const char* error = nullptr;
  if (x.shape.directions > 0 && x.shape.plane() > 0) {
    tile = tile_of(x, dot.out ? 1 : 0);
    double* partial = dot.out ? workspace : nullptr;
    switch (x.shape.type) {
      case kFloat64:
        error = tile.width == 1 ? launch_forward<double, 1>(x, tile, partial, stream)
                                : launch_forward<double, 2>(x, tile, partial, stream);
        break;
      case kBFloat16:
        error = tile.width == 1 ? launch_forward<BFloat16Bits, 1>(x, tile, partial, stream)
                                : launch_forward<BFloat16Bits, 8>(x, tile, partial, stream);
        break;
      default:
        error = tile.width == 1 ? launch_forward<float, 1>(x, tile, partial, stream)
                                : launch_forward<float, 4>(x, tile, partial, stream);
    }
  }
  if (error || !dot.out) return error;
  return launch_finish(x.shape,
                       {.partial = workspace,
                        .chunks = tile.chunks,
                        .directions = x.shape.directions,
                        .channels = x.shape.channels,
                        .out = dot.out,
                        .stride = dot.stride,
                        .inv_std = nullptr,
                        .dot = {nullptr, 0},
                        .accumulate = false},
                       stream);
}

const char* launch_tangent_backward(const BackwardArguments& x, const SumsTo& bias, const SumsTo& gain,
                                    const ChannelRows& dot, bool accumulate, double* workspace, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  Tile tile{};
  const char* error = nullptr;
  double* gain_workspace = workspace;
  if (x.shape.directions > 0 && x.shape.plane() > 0) {
    tile = tile_of(x, (bias.out ? 1 : 0) + (gain.out ? 1 : 0));
    if (bias.out) gain_workspace = workspace + workspace_doubles(x.shape, tile, 1);
    double* to_bias = bias.out ? workspace : nullptr;
    double* to_gain = gain.out ? gain_workspace : nullptr;
    switch (x.shape.type) {
      case kFloat64:
        error = tile.width == 1 ? launch_backward<double, 1>(x, tile, to_bias, to_gain, stream)
                                : launch_backward<double, 2>(x, tile, to_bias, to_gain, stream);
        break;
      case kBFloat16:
        error = tile.width == 1 ? launch_backward<BFloat16Bits, 1>(x, tile, to_bias, to_gain, stream)
                                : launch_backward<BFloat16Bits, 8>(x, tile, to_bias, to_gain, stream);
        break;
      default:
        error = tile.width == 1 ? launch_backward<float, 1>(x, tile, to_bias, to_gain, stream)
                                : launch_backward<float, 4>(x, tile, to_bias, to_gain, stream);
    }
  }
  FinishArguments finish{.partial = workspace,
                         .chunks = tile.chunks,
                         .directions = x.shape.directions,
                         .channels = x.shape.channels,
                         .out = bias.out,
                         .stride = bias.stride,
                         .inv_std = x.inv_std,
                         .dot = {nullptr, 0},
                         .accumulate = accumulate};
  if (!error && bias.out) error = launch_finish(x.shape, finish, stream);
  if (error || !gain.out) return error;
  finish.partial = gain_workspace;
  finish.out = gain.out;
  finish.stride = gain.stride;
  finish.dot = dot;
  return launch_finish(x.shape, finish, stream);
}

}  // namespace curvlab::hvp
