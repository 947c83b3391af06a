// SPDX-License-Identifier: Apache-2.0
// Strips: how the CPU kernels see a masked convolution. The lanes of a register hold as many images, or fewer and of
// each plane several blocks (LaneGrid), which are processed together, a few rows at a time. A strip of the source is
// packed into scratch as
//   [row][channel][column mod stride][column / stride][lane],
// zeros outside the planes included, so that a tile of rows x columns of results reads contiguous aligned vectors for
// each nonzero, at any stride, padding and dilation. All passes are then one correlation:
//   dest[o, t, u] += value * source[c, t a + rho, u b + sigma]      (one entry: o, c, rho, sigma, value)
//   forward: dest = out, source = x, (a, b) = stride, rho = r dh - ph
//   input gradient: one such pass for each phase (y mod sh, z mod sw) of gx; (a, b) = 1, rho = (y mod sh + ph - r dh) /
//   sh weight gradient: the forward's entries, values[entry] = sum over t, u of grad[o, t, u] * source[...]
// The layouts and tile shapes won when measured: axpy into memory reaches 4-18 GFLOP/s where tiles in registers over
// all of a channel's nonzeros reach 50-70 (Zen 4); see tiles_cpu.h.
#pragma once

#include <cstdint>

namespace curvlab::sparse_conv {

// A tensor [N, C, H, W] of any strides, in elements.
struct PlaneView {
  void* data;
  std::int64_t images, channels, height, width;
  std::int64_t image_stride, channel_stride, row_stride, column_stride;
};

// What the lanes of a register hold: `images` images, and of each the blocks of a grid of rows x columns over the plane
// of (t, u); lane (i rows + r) columns + c is block (r, c) of image i. Blocks instead of images bring what is read
// together close together (16 images of 64 x 32 x 32 lie 256 KB apart, in the same sets of every cache), keep whole
// planes in L2 and fill the lanes where images are few.
struct LaneGrid {
  std::int64_t images, rows, columns;
  std::int64_t block_rows, block_columns;  // of one block: t < block_rows, u < block_columns
};

constexpr std::int64_t kMostBlockColumns = 64;  // of blocks that are packed at full speed

// How the packed strip of one source lies in scratch; pitches in elements.
struct StripLayout {
  std::int64_t channels;
  std::int64_t chunk;  // channels packed together: all of them, unless a tile alone overflows the caches
  std::int64_t row_step, column_step;    // a and b
  std::int64_t first_row, first_column;  // source coordinates of the strip's origin at t = u = 0: least rho and sigma
  std::int64_t reach_rows;               // rows of a strip of t rows: (t - 1) a + reach_rows
  std::int64_t columns;                  // packed columns
  std::int64_t phase_pitch, channel_pitch, row_pitch;

  std::int64_t rows(std::int64_t tile_rows) const { return (tile_rows - 1) * row_step + reach_rows; }
};

// One destination channel's entries within one block of source channels.
struct Segment {
  std::int32_t dest;
  std::int32_t begin, count;
};

// Entries ordered by block of source channels, so that a tile's window stays in L1; within a block destination channels
// are ordered by their number of entries, so that the ends of their loops are predicted, unless they are written side
// by side.
struct EntryList {
  const std::int32_t* offsets;         // of the entry's first vector from a tile's origin, in elements
  const Segment* segments;             // the first and last block hold every destination, the others those with entries
  const std::int32_t* block_begin;     // [blocks + 1] into segments
  const std::int64_t* entries_before;  // [dests + 1]: entries of the destinations before, to cut the work evenly
  std::int64_t dests;
  std::int32_t blocks;
  std::int32_t chunk_blocks;  // blocks of a chunk of the layout
  bool by_dest;               // one block, its destinations in their order
};

// One pass of correlations from a packed source into results.
struct StripPass {
  EntryList list;
  const void* values;  // of the entries, in their order
  const void* bias;    // [C_dest] or null
  PlaneView dest;
  std::int64_t first_row, first_column, row_step, column_step;  // dest rows are first_row + t row_step
  std::int64_t rows, columns;                                   // of the grid (t, u)
  bool stream;                                                  // results bypass the caches
};

// The weight gradient of one strip, and the bias'.
struct StripDot {
  EntryList list;
  void* sums;          // of the entries, added to
  void* channel_sums;  // of the gradient [C_out], added to, or null
  std::int64_t rows, columns;
};

}  // namespace curvlab::sparse_conv
