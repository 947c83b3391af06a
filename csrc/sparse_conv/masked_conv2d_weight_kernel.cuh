// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of masked_conv2d_weight: the gradient at the nonzeros alone,
//   dvalue[k] = sum over images n and positions i of in[n, c_k, s i + d_k] gradient[n, o_k, i].
// Two passes without atomics: a block sums its slices of images and positions into its own row of a workspace
// [splits, nonzeros], in a fixed order, then the rows are added up in their order, in double. How many rows there are
// depends on shapes alone, so the result has the same bits on any device and in any run.
#pragma once

#include <cstdint>

#include "common/reduce.cuh"
#include "sparse_conv/window.cuh"

namespace curvlab::sparse_conv {

// Taps that are summed over the lanes together: 8 registers of float, 4 pairs of double.
template <class acc_t>
constexpr int kTogether = 32 / static_cast<int>(sizeof(acc_t));

// Halves the sums that a lane is responsible for: it gives the others to its partner at distance `bit`.
template <int count, int bit, class acc_t>
__device__ __forceinline__ void halve(int lane, acc_t (&sums)[kTogether<acc_t>]) {
  const bool upper = (lane & bit) != 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const acc_t kept = upper ? sums[i + count] : sums[i], given = upper ? sums[i] : sums[i + count];
    sums[i] = kept + __shfl_xor_sync(kFullWarp, given, bit);
  }
}

// The sums over the 32 lanes: 8 with 9 shuffles, not 40. Lane l gets sum l / (32 / count).
__device__ __forceinline__ float sum_over_lanes(int lane, float (&sums)[8]) {
  halve<4, 16>(lane, sums);
  halve<2, 8>(lane, sums);
  halve<1, 4>(lane, sums);
  float sum = sums[0];
  sum += __shfl_xor_sync(kFullWarp, sum, 2);
  return sum + __shfl_xor_sync(kFullWarp, sum, 1);
}
__device__ __forceinline__ double sum_over_lanes(int lane, double (&sums)[4]) {
  halve<2, 16>(lane, sums);
  halve<1, 8>(lane, sums);
  double sum = sums[0];
  sum += __shfl_xor_sync(kFullWarp, sum, 4);
  sum += __shfl_xor_sync(kFullWarp, sum, 2);
  return sum + __shfl_xor_sync(kFullWarp, sum, 1);
}

// Taps [begin, end) of one output channel, whose gradient the warp holds; `row` is the block's of the workspace.
template <class acc_t>
__device__ __forceinline__ void correlate(const GatherArguments& x, const acc_t* window,
                                          const int (&at)[kPositionsPerLane], int begin, int end, bool is_first,
                                          const Sums<acc_t>& gradient, acc_t* row) {
  constexpr int kLanesOfTap = 32 / kTogether<acc_t>;
  const int lane = lane_index();
#pragma unroll 1
  for (int k = begin; k < end; k += kTogether<acc_t>) {
    acc_t sums[kTogether<acc_t>] = {};
#pragma unroll
    for (int j = 0; j < kTogether<acc_t>; ++j) {
      if (k + j < end) {
        const int offset = x.offsets[k + j];
#pragma unroll
        for (int t = 0; t < kPositionsPerLane; ++t) {
          if (at[t] >= 0) {  // beyond the result the window may hold an infinity, which no zero would cancel
            acc_t in[Lanes<acc_t>::kOwnImages];
            load_shared(window + at[t] + offset, in);
#pragma unroll
            for (int i = 0; i < Lanes<acc_t>::kOwnImages; ++i) sums[j] = fused(gradient[t][i], in[i], sums[j]);
          }
        }
      }
    }
    const acc_t sum = sum_over_lanes(lane, sums);
    if (lane % kLanesOfTap == 0 && k + lane / kLanesOfTap < end) {
      acc_t* place = row + k + lane / kLanesOfTap;
      *place = is_first ? sum : *place + sum;
    }
  }
}

constexpr int kWeightBlocksPerMultiprocessor = 2;

template <class scalar_t>
__global__ void __launch_bounds__(kBlockSize, kWeightBlocksPerMultiprocessor)
    weight_windows_kernel(const __grid_constant__ GatherArguments x, int splits,
                          typename Held<scalar_t>::type* __restrict__ workspace) {
  using acc_t = typename Held<scalar_t>::type;
  CURVLAB_DYN_SHARED(acc_t, shared);
  const int channel_tiles = x.channel_tiles(kBlockChannels);
  // A slice stands for a hundred results at least: memory ends long before int does.
  const int slices = static_cast<int>(x.image_blocks() * x.position_tiles());
  const int channel_tile = static_cast<int>(blockIdx.x) % channel_tiles;
  const int split = static_cast<int>(blockIdx.x) / channel_tiles;
  acc_t* row = workspace + split * x.nonzeros;
  for (int slice = split; slice < slices; slice += splits) {
    const WindowTile tile(x, channel_tile, slice, 0);
    const TileMover<const scalar_t, acc_t> mover{x, tile, shared + warp_index() * Lanes<acc_t>::kTile * kPitch};
    Sums<acc_t> gradient[kChannelsPerWarp];
    int at[kPositionsPerLane];  // -1: beyond the result
    window_positions<acc_t>(x, at);
#pragma unroll
    for (int t = 0; t < kPositionsPerLane; ++t) {
      if (!tile.is_inside(x, t * Lanes<acc_t>::kPositions + lane_index() / Lanes<acc_t>::kAcross)) at[t] = -1;
    }
#pragma unroll
    for (int c = 0; c < kChannelsPerWarp; ++c) {
      if (tile.has_own(c)) mover.load(x.order[tile.slot + warp_index() + c * kWarps], gradient[c]);
    }
    const std::int32_t* first = tile.lists(x);
    __syncthreads();  // the scratch becomes the window
    for_each_stage<scalar_t>(x, tile, shared, [&](int stage, const acc_t* window) {
#pragma unroll
      for (int c = 0; c < kChannelsPerWarp; ++c) {
        if (tile.has_own(c)) {
          const std::int32_t* list = first + c * kWarps * (x.stages + 1) + stage;
          correlate(x, window, at, list[0], list[1], slice == split, gradient[c], row);
        }
      }
    });
  }
}

// Any geometry: a block has an output channel and a split of the positions of all images, a warp a tap at a time.
constexpr int kDirectWeightBlocksPerMultiprocessor = 4;

template <class scalar_t>
__global__ void __launch_bounds__(kBlockSize, kDirectWeightBlocksPerMultiprocessor)
    weight_direct_kernel(const __grid_constant__ GatherArguments x, int splits,
                         typename Held<scalar_t>::type* __restrict__ workspace) {
  using acc_t = typename Held<scalar_t>::type;
  const std::int64_t channels = static_cast<std::int64_t>(x.groups) * x.out_channels, plane = x.out_plane();
  const std::int64_t all = x.images * plane, part = (all + splits - 1) / splits;
  const std::int64_t slot = blockIdx.x % channels, split = blockIdx.x / channels, channel = x.order[slot];
  const std::int64_t group = channel / x.out_channels;
  const std::int64_t begin = split * part, end = smaller(begin + part, all);
  const scalar_t* in = static_cast<const scalar_t*>(x.in_data) + group * x.in_channels * x.in_plane();
  const scalar_t* gradient = static_cast<const scalar_t*>(x.out_data) + channel * plane;
  for (int k = x.first[2 * slot] + warp_index(); k < x.first[2 * slot + 1]; k += kWarps) {
    const Tap tap = x.taps[k];
    acc_t sum = acc_t(0);
    std::int64_t image = begin / plane, p = begin % plane + lane_index();
    for (std::int64_t m = begin + lane_index(); m < end; m += 32, p += 32) {
      if (p >= plane) {
        image += p / plane;
        p %= plane;
      }
      // A plane has less than 2^31 positions: checked where the plan is made.
      const int row = static_cast<int>(p) / x.out.w, column = static_cast<int>(p) - row * x.out.w;
      const std::int64_t h = static_cast<std::int64_t>(row) * x.in_step.h + tap.d.h;
      const std::int64_t w = static_cast<std::int64_t>(column) * x.in_step.w + tap.d.w;
      if (h >= 0 && h < x.in.h && w >= 0 && w < x.in.w) {
        const std::int64_t from = image * x.in_image() + tap.offset +
                                  static_cast<std::int64_t>(row) * x.in_step.h * x.in.w +
                                  static_cast<std::int64_t>(column) * x.in_step.w;
        sum = fused(static_cast<acc_t>(load_element(gradient[image * x.out_image() + p])),
                    static_cast<acc_t>(load_element(in[from])), sum);
      }
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
    if (lane_index() == 0) workspace[split * x.nonzeros + k] = sum;
  }
}

// The second pass: rows in their order, each of 8 lanes every eighth, then the lanes.
constexpr int kFinishTaps = 32, kFinishLanes = kBlockSize / kFinishTaps;

template <class scalar_t>
__global__ void __launch_bounds__(kBlockSize)
    weight_finish_kernel(const typename Held<scalar_t>::type* __restrict__ workspace, int splits, std::int64_t nonzeros,
                         scalar_t* __restrict__ out) {
  CURVLAB_SHARED(double, scratch, [kFinishLanes][kFinishTaps]);
  const int column = static_cast<int>(threadIdx.x) % kFinishTaps, lane = static_cast<int>(threadIdx.x) / kFinishTaps;
  for (std::int64_t begin = blockIdx.x * static_cast<std::int64_t>(kFinishTaps); begin < nonzeros;
       begin += static_cast<std::int64_t>(gridDim.x) * kFinishTaps) {
    const std::int64_t k = begin + column;
    double total = 0.0;
    if (k < nonzeros) {
      for (int split = lane; split < splits; split += kFinishLanes) {
        total += static_cast<double>(workspace[split * nonzeros + k]);
      }
    }
    scratch[lane][column] = total;
    __syncthreads();
    if (lane == 0 && k < nonzeros) {
      for (int other = 1; other < kFinishLanes; ++other) total += scratch[other][column];
      store_rounded(out + k, static_cast<typename Held<scalar_t>::type>(total));
    }
    __syncthreads();  // scratch is free again
  }
}

}  // namespace curvlab::sparse_conv
