// SPDX-License-Identifier: Apache-2.0
// How a block of the CUDA kernels lies over [rows, channels]: `columns` threads side by side, each with `width`
// channels of its own in all its rows (so that arguments per channel are read once and sums stay in registers), and as
// many lanes of rows as fill the block.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace curvlab::hvp {

constexpr int kBlockSize = 256;
constexpr std::int64_t kRowsPerThread = 16;
constexpr std::int64_t kLeastChunks = 64;  // rows a thread are given up for more blocks until there are so many
constexpr std::int64_t kLargestGridYZ = 65535;

struct Tile {
  std::int64_t rows, channels, plane;  // rows * channels >= plane: what lies behind plane is not there
  std::int64_t chunk_rows, chunks;     // a block's rows
  std::int32_t columns, column_tiles, width;
};

CURVLAB_HD std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// A tile of threads with `width` channels each. It depends on the shape alone, so sums have the same bits on any
// device.
inline Tile make_tile(std::int64_t rows, std::int64_t channels, int width) {
  const std::int64_t groups = (channels + width - 1) / width;
  int columns = 1;
  while (columns < groups && columns < kBlockSize) columns *= 2;
  const std::int64_t lanes = kBlockSize / columns;
  std::int64_t per_thread = rows / (lanes * kLeastChunks);
  per_thread = per_thread < 1 ? 1 : smaller(per_thread, kRowsPerThread);
  const std::int64_t chunk_rows = lanes * per_thread;
  return {rows,
          channels,
          rows * channels,
          chunk_rows,
          (rows + chunk_rows - 1) / chunk_rows,
          columns,
          static_cast<std::int32_t>((groups + columns - 1) / columns),
          width};
}

// Where nothing depends on the channel, elements are cut into rows as long as a block.
inline Tile make_flat_tile(std::int64_t plane, int width) {
  const std::int64_t channels = static_cast<std::int64_t>(kBlockSize) * width;
  Tile tile = make_tile((plane + channels - 1) / channels, channels, width);
  tile.plane = plane;
  return tile;
}

}  // namespace curvlab::hvp
