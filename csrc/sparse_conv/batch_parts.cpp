// SPDX-License-Identifier: Apache-2.0
#include "sparse_conv/batch_parts.h"

namespace curvlab::sparse_conv {
namespace {

constexpr std::int64_t kFoldedColumns = 8;      // of BatchPart
constexpr std::int64_t kLeastBlockColumns = 6;  // of blocks whose results are no whole lines

// Whether every position of the input has one of the output: only then may planes be cut into blocks, as the weight
// gradient would else multiply zeros by what no output reads (infinities there would give NaN).
bool maps_planes_to_planes(const ConvWeight& weight, std::int64_t height, std::int64_t width) {
  const std::int64_t out_height = output_size(weight, height, 0), out_width = output_size(weight, width, 1);
  return (height + weight.stride[0] - 1) / weight.stride[0] == out_height &&
         (width + weight.stride[1] - 1) / weight.stride[1] == out_width;
}

// Blocks that pack at full speed, for strides of one: of eight columns or of whole lines, whose results are written as
// lines too, else of whatever planes divide into; images alone where they do not. Of the grids that fit, these won: 4 x
// 4 for planes of 32 columns, 2 x 2 for 16, 4 x 1 for 8.
LaneGrid fast_grid(const ConvWeight& weight, std::int64_t height, std::int64_t width, std::int64_t lanes) {
  const LaneGrid whole{lanes, 1, 1, 0, 0};
  if (weight.stride[0] != 1 || weight.stride[1] != 1) return whole;
  constexpr std::int64_t kGrids[][2] = {{4, 4}, {2, 2}, {4, 1}};
  for (const bool lines : {true, false}) {
    for (const auto& [rows, columns] : kGrids) {
      if (lanes % (rows * columns) != 0 || height % rows != 0 || width % columns != 0) continue;
      const std::int64_t block = width / columns;
      const bool in_lines = block == 8 || (columns == 4 && block % 16 == 0);
      if (block <= kMostBlockColumns && (lines ? in_lines : block >= kLeastBlockColumns && columns > 1)) {
        return {lanes / (rows * columns), rows, columns, 0, 0};
      }
    }
  }
  return whole;
}

// As many blocks as planes divide into, for fewer images than lanes.
LaneGrid grid_of_few(const ConvWeight& weight, std::int64_t height, std::int64_t width, std::int64_t images,
                     std::int64_t lanes) {
  const std::int64_t out_height = output_size(weight, height, 0), out_width = output_size(weight, width, 1);
  LaneGrid best{lanes, 1, 1, 0, 0};
  if (!maps_planes_to_planes(weight, height, width)) return best;
  for (std::int64_t rows = 1; rows <= lanes; rows *= 2) {
    for (std::int64_t columns = 1; rows * columns <= lanes; columns *= 2) {
      if (out_height % rows != 0 || out_width % columns != 0) continue;
      const std::int64_t held = lanes / (rows * columns);
      if (held >= images && held < best.images) best = {held, rows, columns, 0, 0};
    }
  }
  return best;
}

}  // namespace

std::vector<BatchPart> parts_of_batch(const ConvWeight& weight, std::int64_t images, std::int64_t height,
                                      std::int64_t width, std::int64_t lanes, bool fast_blocks) {
  const LaneGrid whole{lanes, 1, 1, 0, 0};
  std::vector<BatchPart> parts;
  std::int64_t first = 0;
  if (weight.taps() == 1 && height * width == 1 && weight.padding[0] + weight.padding[1] == 0) {
    const std::int64_t blocks = images / lanes, columns = kFoldedColumns;
    if (blocks >= columns) parts.push_back({0, blocks / columns * columns * lanes, blocks / columns, columns, whole});
    if (!parts.empty()) first = parts.back().images;
    if (blocks % columns != 0) {
      parts.push_back({first, blocks % columns * lanes, 1, blocks % columns, whole});
      first += parts.back().images;
    }
  } else {
    const bool fast = fast_blocks && maps_planes_to_planes(weight, height, width);
    const LaneGrid grid = fast ? fast_grid(weight, height, width, lanes) : whole;
    first = images / grid.images * grid.images;
    if (first > 0) parts.push_back({0, first, 0, 0, grid});
  }
  if (first < images || images == 0) {
    parts.push_back({first, images - first, 0, 0, grid_of_few(weight, height, width, images - first, lanes)});
  }
  return parts;
}

}  // namespace curvlab::sparse_conv
