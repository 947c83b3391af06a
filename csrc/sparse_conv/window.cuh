// SPDX-License-Identifier: Apache-2.0
// What the windowed kernels share: which tile a block has, its windows staged in shared memory, and the way of a warp's
// tile between registers and memory. Both sides are NCHW in memory and [position][image] in shared memory: 8 positions
// x 4 images move together, which are whole 32-byte sectors there (aligned rows) and 32 different banks here.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "common/load.cuh"
#include "sparse_conv/async_copy.cuh"
#include "sparse_conv/geometry_cuda.h"

namespace curvlab::sparse_conv {

template <class acc_t>
struct Lanes {
  static constexpr int kOwnImages = lane_images(sizeof(acc_t));  // 16 bytes
  static constexpr int kAcross = kImages / kOwnImages;           // lanes side by side over the images
  static constexpr int kPositions = 32 / kAcross;                // positions of one step
  static constexpr int kTile = tile_positions(sizeof(acc_t));
  static_assert(kPositions * kPositionsPerLane == kTile);
};

template <class acc_t>
using Sums = acc_t[kPositionsPerLane][Lanes<acc_t>::kOwnImages];

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }

__device__ __forceinline__ void load_shared(const float* from, float (&values)[4]) {
  const float4 load = *reinterpret_cast<const float4*>(from);
  values[0] = load.x, values[1] = load.y, values[2] = load.z, values[3] = load.w;
}
__device__ __forceinline__ void load_shared(const double* from, double (&values)[2]) {
  const double2 load = *reinterpret_cast<const double2*>(from);
  values[0] = load.x, values[1] = load.y;
}
__device__ __forceinline__ void store_shared(float* to, const float (&values)[4]) {
  *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
}
__device__ __forceinline__ void store_shared(double* to, const double (&values)[2]) {
  *reinterpret_cast<double2*>(to) = {values[0], values[1]};
}

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

__device__ __forceinline__ void store_rounded(float* out, float value) { *out = value; }
__device__ __forceinline__ void store_rounded(double* out, double value) { *out = value; }
__device__ __forceinline__ void store_rounded(BFloat16Bits* out, float value) { *out = bfloat16_from_float(value); }

// What a block works on: images, a tile of positions of one phase, and output channels of one group.
struct WindowTile {
  std::int64_t image;  // its first
  int images;
  int slot, slots;  // in `order`: its first, and how many of kBlockChannels there are
  int group, phase;
  Pair corner;      // first position of the tile within the phase
  Pair extent;      // positions of the phase
  Pair out_corner;  // r

  // Channels vary first, so that blocks which stage the same window run together.
  __device__ __forceinline__ WindowTile(const GatherArguments& x, int channel_tile, std::int64_t slice, int its_phase) {
    const int tiles_per_group = x.channel_tiles(kBlockChannels) / x.groups;
    group = channel_tile / tiles_per_group;
    const int first_of_group = channel_tile % tiles_per_group * kBlockChannels;
    slot = group * x.out_channels + first_of_group;
    slots = static_cast<int>(smaller(kBlockChannels, x.out_channels - first_of_group));
    const std::int64_t tiles = x.position_tiles();
    const int tile = static_cast<int>(slice % tiles);
    corner = {tile / x.tiles.w * x.tile.h, tile % x.tiles.w * x.tile.w};
    image = slice / tiles * kImages;
    images = static_cast<int>(smaller(kImages, x.images - image));
    phase = its_phase;
    out_corner = {phase / x.out_step.w, phase % x.out_step.w};
    extent = {phase_extent(x.out.h, x.out_step.h, out_corner.h), phase_extent(x.out.w, x.out_step.w, out_corner.w)};
  }

  // Tiles are counted for the largest phase.
  __device__ __forceinline__ bool is_empty() const { return corner.h >= extent.h || corner.w >= extent.w; }

  // Whether the calling warp has a channel c: slot + warp + c * kWarps.
  __device__ __forceinline__ bool has_own(int c) const { return warp_index() + c * kWarps < slots; }
  // The row of `first` of its channel 0; of channel c it is kWarps rows further on.
  __device__ __forceinline__ const std::int32_t* lists(const GatherArguments& x) const {
    return x.first +
           (static_cast<std::int64_t>(phase) * x.groups * x.out_channels + slot + warp_index()) * (x.stages + 1);
  }
  __device__ __forceinline__ bool is_inside(const GatherArguments& x, int position) const {
    return corner.h + position / x.tile.w < extent.h && corner.w + position % x.tile.w < extent.w;
  }
};

__device__ __forceinline__ void stage_one(float* to, const float* from) { copy_async(to, from); }
__device__ __forceinline__ void stage_one(double* to, const double* from) { copy_async(to, from); }
__device__ __forceinline__ void stage_one(float* to, const BFloat16Bits* from) { *to = load_element(*from); }

// The window of a stage's channels: buffer[(channel, row, column)][image], zeros outside of the image and behind the
// last image. bfloat16 is widened on the way, which no asynchronous copy can do.
template <class scalar_t, class acc_t>
__device__ __forceinline__ void stage_window(const GatherArguments& x, const WindowTile& tile, Pair origin, int stage,
                                             acc_t* buffer) {
  const int lane = lane_index(), column = lane % 8, first_image = lane / 8;
  const int begin = stage * x.stage_channels,
            channels = static_cast<int>(smaller(x.stage_channels, x.in_channels - begin));
  const int plane = x.window_positions(), positions = channels * plane;
  const scalar_t* in = static_cast<const scalar_t*>(x.in_data) + tile.image * x.in_image() +
                       (static_cast<std::int64_t>(tile.group) * x.in_channels + begin) * x.in_plane() +
                       first_image * x.in_image();
  const std::int64_t step = 4 * x.in_image();
  const int top = tile.corner.h * x.in_step.h + origin.h, left = tile.corner.w * x.in_step.w + origin.w;
  for (int q = warp_index() * 8 + column; q < positions; q += kWarps * 8) {
    const int channel = q / plane, p = q % plane, h = top + p / x.window.w, w = left + p % x.window.w;
    const bool inside = h >= 0 && h < x.in.h && w >= 0 && w < x.in.w;
    const scalar_t* from = in + channel * x.in_plane() + static_cast<std::int64_t>(h) * x.in.w + w;
    acc_t* to = buffer + q * kPitch + first_image;
#pragma unroll 2  // fully unrolled, its addresses would push sums out of the registers
    for (int i = first_image; i < kImages; i += 4, from += step, to += 4) {
      if (inside && i < tile.images) {
        stage_one(to, from);
      } else {
        *to = acc_t(0);
      }
    }
  }
}

// use(stage, window) for every stage, the next one arriving meanwhile. Ends with a barrier where it staged anything.
template <class scalar_t, class acc_t, class Use>
__device__ __forceinline__ void for_each_stage(const GatherArguments& x, const WindowTile& tile, acc_t* shared,
                                               Use use) {
  const Phase phase = x.phases[tile.phase];
  const int size = x.stage_channels * x.window_positions() * kPitch;
  if (phase.stages > 0) stage_window<scalar_t>(x, tile, phase.origin, 0, shared);
  commit_copies();
  for (int stage = 0; stage < phase.stages; ++stage) {
    if (stage + 1 < phase.stages) {
      stage_window<scalar_t>(x, tile, phase.origin, stage + 1, shared + (stage + 1) % 2 * size);
    }
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    use(stage, static_cast<const acc_t*>(shared + stage % 2 * size));
    __syncthreads();  // nobody reads the window any more: it takes the stage after the next
  }
}

// Where a lane's positions lie in a window: numbers from its beginning, its images included.
template <class acc_t>
__device__ __forceinline__ void window_positions(const GatherArguments& x, int (&at)[kPositionsPerLane]) {
  const int lane = lane_index();
#pragma unroll
  for (int t = 0; t < kPositionsPerLane; ++t) {
    const int p = t * Lanes<acc_t>::kPositions + lane / Lanes<acc_t>::kAcross;
    at[t] = (p / x.tile.w * x.in_step.h * x.window.w + p % x.tile.w * x.in_step.w) * kPitch +
            lane % Lanes<acc_t>::kAcross * Lanes<acc_t>::kOwnImages;
  }
}

// A warp's tile of channel `channel` of `out_data` between registers and memory, through `scratch` [position][kPitch],
// which is the warp's own.
template <class scalar_t, class acc_t>
struct TileMover {
  const GatherArguments& x;
  const WindowTile& tile;
  acc_t* scratch;

  // f(element of out_data, number in scratch) for every position and image of the tile that there is; rest(number) for
  // the others.
  template <class F, class Rest>
  __device__ __forceinline__ void for_each_element(int channel, F f, Rest rest) const {
    const int lane = lane_index(), first_image = lane / 8;
    scalar_t* data =
        static_cast<scalar_t*>(x.out_data) + (tile.image + first_image) * x.out_image() + channel * x.out_plane();
    const std::int64_t step = 4 * x.out_image();
#pragma unroll 1
    for (int p = lane % 8; p < Lanes<acc_t>::kTile; p += 8) {
      const bool inside = tile.is_inside(x, p);
      const int row = tile.out_corner.h + (tile.corner.h + p / x.tile.w) * x.out_step.h;
      const int column = tile.out_corner.w + (tile.corner.w + p % x.tile.w) * x.out_step.w;
      scalar_t* at = data + static_cast<std::int64_t>(row) * x.out.w + column;
      acc_t* number = scratch + p * kPitch + first_image;
#pragma unroll 4
      for (int i = first_image; i < kImages; i += 4, at += step, number += 4) {
        if (inside && i < tile.images) {
          f(at, number);
        } else {
          rest(number);
        }
      }
    }
  }

  __device__ __forceinline__ acc_t* own(int t) const {
    const int lane = lane_index();
    return scratch + (t * Lanes<acc_t>::kPositions + lane / Lanes<acc_t>::kAcross) * kPitch +
           lane % Lanes<acc_t>::kAcross * Lanes<acc_t>::kOwnImages;
  }

  __device__ __forceinline__ void store(int channel, const Sums<acc_t>& sums) const {
    const acc_t bias =
        x.bias ? static_cast<acc_t>(load_element(static_cast<const scalar_t*>(x.bias)[channel])) : acc_t(0);
#pragma unroll
    for (int t = 0; t < kPositionsPerLane; ++t) store_shared(own(t), sums[t]);
    __syncwarp();
    for_each_element(
        channel, [&](scalar_t* at, const acc_t* number) { store_rounded(at, *number + bias); }, [](const acc_t*) {});
    __syncwarp();  // the scratch takes the next channel
  }

  __device__ __forceinline__ void load(int channel, Sums<acc_t>& sums) const {
    for_each_element(
        channel, [](const scalar_t* at, acc_t* number) { *number = static_cast<acc_t>(load_element(*at)); },
        [](acc_t* number) { *number = acc_t(0); });
    __syncwarp();
#pragma unroll
    for (int t = 0; t < kPositionsPerLane; ++t) load_shared(own(t), sums[t]);
    __syncwarp();
  }
};

}  // namespace curvlab::sparse_conv
