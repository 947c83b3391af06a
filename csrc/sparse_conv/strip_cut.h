// SPDX-License-Identifier: Apache-2.0
// A part of a batch in strips, and the scratch that a strip takes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sparse_conv/cpu_kernels.h"
#include "sparse_conv/strip_plan.h"

namespace curvlab::sparse_conv {

constexpr std::int64_t kStripBytes = 1536 * 1024;  // packed sources of a strip: most of a 2 MB L2 cache

// How a batch is cut into strips: so many images together, of rows of their blocks.
struct Cut {
  std::int64_t images, together, groups, strips, strip_rows;

  Cut(std::int64_t images, std::int64_t rows, std::int64_t bytes_per_row, std::int64_t together, std::int64_t tile_rows,
      bool single_tiles)
      : images(images), together(together), groups((images + together - 1) / together) {
    const std::int64_t fit = kStripBytes / std::max<std::int64_t>(bytes_per_row, 1);
    const std::int64_t most = single_tiles ? tile_rows : std::max(fit, tile_rows);
    strips = (rows + most - 1) / most;
    strip_rows = (rows + strips - 1) / strips;
    strip_rows = std::min((strip_rows + tile_rows - 1) / tile_rows * tile_rows, rows);
    strips = (rows + strip_rows - 1) / strip_rows;
  }

  std::int64_t units() const { return groups * strips; }
  // `first` of the units that this thread runs one after another.
  StripTask task(std::int64_t unit, std::int64_t first, std::int64_t part, std::int64_t parts) const {
    const std::int64_t image = unit / strips * together, strip = unit % strips;
    return {image, std::min(together, images - image), strip * strip_rows, strip_rows, part,
            parts, unit > first && strip > 0,          strip + 1 == strips};
  }
};

// Lanes, tile and bytes of an element: what the strips of a type are made of.
struct StripType {
  std::int64_t lanes, tile, element;

  std::int64_t tile_rows(std::int64_t columns) const {
    const std::int64_t tiles = std::max<std::int64_t>((columns + tile - 1) / tile, 1);
    return std::clamp<std::int64_t>(tile / std::max<std::int64_t>((columns + tiles - 1) / tiles, 1), 1, 4);
  }
  // Of the accumulators of a tile's channels, in elements.
  std::int64_t acc_size(std::int64_t channels) const {
    return std::max<std::int64_t>(channels, 1) * tile * lanes + lanes * lanes;
  }
};

// Strips of a pass, with their scratch in elements: accumulators, then the packed gradient, then the packed input.
struct StripSizes {
  Cut cut;
  std::int64_t acc, grad, x;

  std::int64_t elements() const { return acc + grad + x; }
};

inline StripSizes forward_sizes(const CpuPlan& plan, std::int64_t images, const StripType& type) {
  const LaneGrid& grid = plan.grid;
  const StripLayout& layout = plan.x_layout;
  const Cut cut(images, std::min(plan.out_height, grid.block_rows), layout.row_pitch * layout.row_step * type.element,
                grid.images, type.tile_rows(std::min(plan.out_width, grid.block_columns)),
                layout.chunk < layout.channels);  // accumulators of one tile stay from chunk to chunk
  return {cut, type.acc_size(plan.weight.channels_out), 0, layout.rows(cut.strip_rows) * layout.row_pitch};
}

inline StripSizes backward_sizes(const CpuPlan& plan, std::int64_t images, bool wants_x, bool wants_values,
                                 const StripType& type) {
  const LaneGrid& grid = plan.grid;
  const StripLayout &x = plan.x_layout, &grad = plan.grad_layout;
  const std::int64_t x_row = wants_values ? x.row_pitch * x.row_step : 0;
  const Cut cut(images, std::min(wants_x ? plan.grad_rows : plan.out_height, grid.block_rows),
                (grad.row_pitch + x_row) * type.element, grid.images,
                type.tile_rows(std::min(plan.out_width, grid.block_columns)), false);
  return {cut, type.acc_size(plan.weight.channels_in()), grad.rows(cut.strip_rows) * grad.row_pitch,
          wants_values ? x.rows(cut.strip_rows) * x.row_pitch : 0};
}

}  // namespace curvlab::sparse_conv
