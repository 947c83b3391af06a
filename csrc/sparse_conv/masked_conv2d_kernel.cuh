// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of masked_conv2d and of its input gradient: the sum of geometry_cuda.h over a list of taps.
//
// Windowed, for many images: a tap is used once at every position, so every multiplication needs one number of its own
// from shared memory. An SM delivers 32 numbers a clock and multiplies 128 (H100; A100: 64) in float32, so a quarter of
// H100's FP32 peak is the ceiling (Sputnik reports 27 % on V100). Hence, by counting and with dense efficiencies that
// are assumed (cuDNN float32 70 %, TF32 and bfloat16 60 % of their peaks), the density below which this can win is
// (0.25 FP32 peak) / (efficiency * dense peak), that is, dense convolution is expected to win below these sparsities:
//   cuDNN true float32            about 64 %
//   cuDNN TF32 (torch's default)  about 94 to 95 %
//   cuDNN bfloat16                about 94 to 97 %
// and far above them memory is the floor (64 -> 64 channels at 32 x 32, 128 images: 1.6 times TF32 at 98 %). Nothing of
// this was measured on a GPU. bfloat16 is stored as such and widened when staged: half of the memory traffic, but the
// same bound of shared memory.
#pragma once

#include <cstdint>

#include "sparse_conv/window.cuh"

namespace curvlab::sparse_conv {

// Taps [begin, end) of one output channel: value and place in the window are the same for all lanes.
template <class scalar_t, class acc_t>
__device__ __forceinline__ void walk(const GatherArguments& x, const acc_t* window, const int (&at)[kPositionsPerLane],
                                     int begin, int end, Sums<acc_t>& sums) {
  const scalar_t* values = static_cast<const scalar_t*>(x.values);
  if (begin >= end) return;
  int offset = x.offsets[begin];
  acc_t value = load_element(values[begin]);
#pragma unroll 1
  for (int k = begin; k < end; ++k) {
    const int here = offset;
    const acc_t factor = value;
    if (k + 1 < end) {  // on its way while this tap is multiplied
      offset = x.offsets[k + 1];
      value = load_element(values[k + 1]);
    }
#pragma unroll
    for (int t = 0; t < kPositionsPerLane; ++t) {
      acc_t in[Lanes<acc_t>::kOwnImages];
      load_shared(window + at[t] + here, in);
#pragma unroll
      for (int i = 0; i < Lanes<acc_t>::kOwnImages; ++i) sums[t][i] = fused(factor, in[i], sums[t][i]);
    }
  }
}

constexpr int kWindowBlocksPerMultiprocessor = 2;

template <class scalar_t>
__global__ void __launch_bounds__(kBlockSize, kWindowBlocksPerMultiprocessor)
    gather_windows_kernel(const __grid_constant__ GatherArguments x) {
  using acc_t = typename Held<scalar_t>::type;
  CURVLAB_DYN_SHARED(acc_t, shared);
  const int channel_tiles = x.channel_tiles(kBlockChannels);
  const std::int64_t slices = x.image_blocks() * x.position_tiles();
  const std::int64_t work = channel_tiles * slices * x.phase_count();
  int at[kPositionsPerLane];
  window_positions<acc_t>(x, at);
  for (std::int64_t i = blockIdx.x; i < work; i += gridDim.x) {
    const WindowTile tile(x, static_cast<int>(i % channel_tiles), i / channel_tiles % slices,
                          static_cast<int>(i / channel_tiles / slices));
    if (tile.is_empty()) continue;
    Sums<acc_t> sums[kChannelsPerWarp] = {};
    const std::int32_t* first = tile.lists(x);
    for_each_stage<scalar_t>(x, tile, shared, [&](int stage, const acc_t* window) {
#pragma unroll
      for (int c = 0; c < kChannelsPerWarp; ++c) {
        if (tile.has_own(c)) {
          const std::int32_t* list = first + c * kWarps * (x.stages + 1) + stage;
          walk<scalar_t>(x, window, at, list[0], list[1], sums[c]);
        }
      }
    });
    const TileMover<scalar_t, acc_t> mover{x, tile, shared + warp_index() * Lanes<acc_t>::kTile * kPitch};
#pragma unroll
    for (int c = 0; c < kChannelsPerWarp; ++c) {
      if (tile.has_own(c)) mover.store(x.order[tile.slot + warp_index() + c * kWarps], sums[c]);
    }
    __syncthreads();  // the scratch becomes the next tile's window
  }
}

// Direct: any geometry and any number of images, read through the caches. A warp has one output channel at 128
// positions, images and positions counted through.
constexpr int kDirectBlocksPerMultiprocessor = 3;  // 4 would spill

// Position m of a phase, all images counted through.
struct DirectPosition {
  std::int64_t image;
  int row, column;

  __device__ __forceinline__ DirectPosition(std::int64_t m, Pair extent) {
    const std::int64_t plane = static_cast<std::int64_t>(extent.h) * extent.w;
    image = m / plane;
    const unsigned p = static_cast<unsigned>(m - image * plane);  // planes have less than 2^31 positions
    row = static_cast<int>(p / static_cast<unsigned>(extent.w));
    column = static_cast<int>(p) - row * extent.w;
  }
};

// Taps of one list at a lane's positions m, m + 32, ...; those from `end` on get nothing.
template <class scalar_t, class acc_t>
__device__ __forceinline__ void walk_direct(const GatherArguments& x, const scalar_t* in, Pair extent, std::int64_t m,
                                            std::int64_t end, const std::int32_t* list,
                                            acc_t (&sums)[kDirectPositions]) {
  const scalar_t* values = static_cast<const scalar_t*>(x.values);
  const scalar_t* from[kDirectPositions];
  int h[kDirectPositions], w[kDirectPositions];
#pragma unroll
  for (int t = 0; t < kDirectPositions; ++t) {
    const bool exists = m + t * 32 < end;
    const DirectPosition at(exists ? m + t * 32 : 0, extent);
    h[t] = exists ? at.row * x.in_step.h : -(1 << 30);  // no d brings it into the image
    w[t] = at.column * x.in_step.w;
    from[t] = in + at.image * x.in_image() + static_cast<std::int64_t>(at.row) * x.in_step.h * x.in.w + w[t];
  }
  const int last = list[1];
#pragma unroll 1
  for (int k = list[0]; k < last; ++k) {
    const Tap tap = x.taps[k];
    const acc_t factor = load_element(values[k]);
#pragma unroll
    for (int t = 0; t < kDirectPositions; ++t) {
      const int row = h[t] + tap.d.h, column = w[t] + tap.d.w;
      if (row >= 0 && row < x.in.h && column >= 0 && column < x.in.w) {
        sums[t] = fused(factor, static_cast<acc_t>(load_element(from[t][tap.offset])), sums[t]);
      }
    }
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kBlockSize, kDirectBlocksPerMultiprocessor)
    gather_direct_kernel(const __grid_constant__ GatherArguments x) {
  using acc_t = typename Held<scalar_t>::type;
  const int channel_tiles = x.channel_tiles(kWarps), tiles_per_group = channel_tiles / x.groups;
  const std::int64_t slices = direct_slices(x), work = channel_tiles * slices * x.phase_count();
  for (std::int64_t i = blockIdx.x; i < work; i += gridDim.x) {
    const int channel_tile = static_cast<int>(i % channel_tiles), phase = static_cast<int>(i / channel_tiles / slices);
    const int group = channel_tile / tiles_per_group;
    const int of_group = channel_tile % tiles_per_group * kWarps + warp_index();
    const Pair corner{phase / x.out_step.w, phase % x.out_step.w};
    const Pair extent{phase_extent(x.out.h, x.out_step.h, corner.h), phase_extent(x.out.w, x.out_step.w, corner.w)};
    const std::int64_t end = x.images * extent.h * extent.w;
    const std::int64_t m = i / channel_tiles % slices * kDirectTile + lane_index();
    if (of_group >= x.out_channels || m >= end) continue;
    const int slot = group * x.out_channels + of_group, channel = x.order[slot];
    const scalar_t* in =
        static_cast<const scalar_t*>(x.in_data) + static_cast<std::int64_t>(group) * x.in_channels * x.in_plane();
    acc_t sums[kDirectPositions] = {};
    walk_direct(x, in, extent, m, end,
                x.first + (static_cast<std::int64_t>(phase) * x.groups * x.out_channels + slot) * 2, sums);
    const acc_t bias =
        x.bias ? static_cast<acc_t>(load_element(static_cast<const scalar_t*>(x.bias)[channel])) : acc_t(0);
#pragma unroll
    for (int t = 0; t < kDirectPositions; ++t) {
      if (m + t * 32 >= end) break;
      const DirectPosition at(m + t * 32, extent);
      const std::int64_t row = corner.h + static_cast<std::int64_t>(at.row) * x.out_step.h;
      store_rounded(static_cast<scalar_t*>(x.out_data) + at.image * x.out_image() + channel * x.out_plane() +
                        row * x.out.w + corner.w + static_cast<std::int64_t>(at.column) * x.out_step.w,
                    sums[t] + bias);
    }
  }
}

// Values in the order of the transposed list.
template <class scalar_t>
__global__ void __launch_bounds__(kBlockSize)
    permute_values_kernel(const scalar_t* __restrict__ values, const std::int32_t* __restrict__ source,
                          std::int64_t count, scalar_t* __restrict__ permuted) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kBlockSize;
  for (std::int64_t k = static_cast<std::int64_t>(blockIdx.x) * kBlockSize + threadIdx.x; k < count; k += step) {
    permuted[k] = values[source[k]];
  }
}

}  // namespace curvlab::sparse_conv
