// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of the masked convolutions compute, and how they lie over it. Forward, input gradient and (read
// backward) weight gradient are one sum over a list of taps, a "gather":
//   out[n, o, r + S i] = bias[o] + sum over the taps k of (phase r, o) of value[k] in[n, c_k, s i + d_k]
// per dimension of the image, with
//   forward         o: filters, c: inputs,  S = 1, s = stride, d = kernel position * dilation - padding; one phase, r =
//   0 input gradient  o: inputs,  c: filters, S = stride, s = 1: for h = r + stride i, stride divides
//                   h + padding - kernel position * dilation for the taps of one residue r alone, and
//                   d = (r + padding - kernel position * dilation) / stride: no zero is multiplied
//   weight gradient dvalue[k] = sum over n, i of in[n, c_k, s i + d_k] gradient[n, o_k, i], on the forward list
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "common/hd.h"

namespace curvlab::sparse_conv {

struct Pair {  // along height and width
  std::int32_t h, w;
};

struct Phase {
  Pair origin;           // smallest d of its taps: where windows begin
  std::int32_t stages;   // of input channels; 0: no taps
  std::int32_t padding;  // to 16 bytes
};

// A tap of the direct kernels: `offset` = channel * height * width + d.h * width + d.w within an image of `in`.
struct Tap {
  std::int64_t offset;
  Pair d;
};

// The windowed kernels. A block has 8 warps; a warp holds kChannelsPerWarp output channels of a tile of
// kPositions<acc_t> positions and 32 images in registers: a lane has 16 bytes of images at kPositionsPerLane positions.
constexpr int kBlockSize = 256;
constexpr int kWarps = kBlockSize / 32;
constexpr int kImages = 32;          // of a block
constexpr int kChannelsPerWarp = 4;  // 64 registers of sums; 2 would stage every window twice as often
constexpr int kBlockChannels = kWarps * kChannelsPerWarp;
constexpr int kPositionsPerLane = 4;
constexpr int kPitch = kImages + 4;  // numbers between two positions of a window: 8 positions x 4 images hit 32 banks
// Two blocks on an A100 (164 KiB a multiprocessor, 1 of it the system's for each block), two on an H100.
constexpr std::int64_t kSharedBytes = 80 * 1024;

// The direct kernels: a warp has one output channel at 32 lanes x kDirectPositions positions of any images.
constexpr int kDirectPositions = 4;
constexpr int kDirectTile = 32 * kDirectPositions;

constexpr int lane_images(int accumulator_bytes) { return 16 / accumulator_bytes; }
// 16 for float, 8 for double
constexpr int tile_positions(int accumulator_bytes) {
  return 32 * lane_images(accumulator_bytes) / kImages * kPositionsPerLane;
}

// By value to every kernel. Pointers are to the device.
struct GatherArguments {
  std::int64_t images, nonzeros;
  std::int32_t groups, in_channels, out_channels;  // channels of one group
  std::int32_t type;                               // ElementType, not kFloat16
  Pair in, out;                                    // extents
  Pair in_step, out_step;                          // s, S
  // windowed kernels only
  Pair tile, window, tiles;     // extents of a tile, of its window; tiles of the largest phase
  std::int32_t stage_channels;  // input channels staged at once
  std::int32_t stages;          // of the phase that has most
  std::int32_t shared_bytes;
  std::int32_t windowed;  // else the direct kernels
  // lists: `order` [groups * out_channels] output channels of every group, most nonzeros first: slots; `first`
  // [phases, slots, stages + 1] where the taps of a stage begin, and where the last one ends (direct: one stage)
  const Phase* phases;
  const std::int32_t *order, *first;
  const std::int32_t* offsets;          // [nonzeros] windowed: (channel in stage, position in window) times kPitch
  const Tap* taps;                      // [nonzeros] direct
  const void *in_data, *values, *bias;  // values in the order of the list; bias may be null
  void* out_data;

  CURVLAB_HD std::int64_t in_plane() const { return static_cast<std::int64_t>(in.h) * in.w; }
  CURVLAB_HD std::int64_t out_plane() const { return static_cast<std::int64_t>(out.h) * out.w; }
  CURVLAB_HD std::int64_t in_image() const { return in_plane() * groups * in_channels; }
  CURVLAB_HD std::int64_t out_image() const { return out_plane() * groups * out_channels; }
  CURVLAB_HD int phase_count() const { return out_step.h * out_step.w; }
  CURVLAB_HD int window_positions() const { return window.h * window.w; }
  CURVLAB_HD std::int64_t image_blocks() const { return (images + kImages - 1) / kImages; }
  CURVLAB_HD std::int64_t position_tiles() const { return static_cast<std::int64_t>(tiles.h) * tiles.w; }
  // Tiles of output channels in all groups; no tile holds channels of two groups.
  CURVLAB_HD int channel_tiles(int channels) const { return groups * ((out_channels + channels - 1) / channels); }
};

CURVLAB_HD std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Positions of a phase: rows (columns) r, r + S, ... below the extent.
CURVLAB_HD int phase_extent(int extent, int step, int phase) {
  return extent > phase ? (extent - phase + step - 1) / step : 0;
}

// Slices of kDirectTile positions of all images, in the largest phase.
CURVLAB_HD std::int64_t direct_slices(const GatherArguments& x) {
  const std::int64_t positions =
      static_cast<std::int64_t>(phase_extent(x.out.h, x.out_step.h, 0)) * phase_extent(x.out.w, x.out_step.w, 0);
  return (x.images * positions + kDirectTile - 1) / kDirectTile;
}

}  // namespace curvlab::sparse_conv
