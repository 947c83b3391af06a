// SPDX-License-Identifier: Apache-2.0
// A batch in parts, each with what its lanes hold (LaneGrid).
#pragma once

#include <cstdint>
#include <vector>

#include "sparse_conv/masked_conv2d.h"
#include "sparse_conv/strip.h"

namespace curvlab::sparse_conv {

// A layer of 1 x 1 planes (a linear one) has nothing to fill a tile's columns with: there images take their place,
// `columns` registers of them in a row; 0: planes as they are.
struct BatchPart {
  std::int64_t first, images;
  std::int64_t rows, columns;
  LaneGrid grid;  // its blocks are left to the plan

  std::int64_t height(std::int64_t planes) const { return columns == 0 ? planes : rows; }
  std::int64_t width(std::int64_t planes) const { return columns == 0 ? planes : columns; }

  // The part of a tensor's view; `lanes` of a register, `element` bytes each.
  PlaneView of(const PlaneView& whole, std::int64_t lanes, std::int64_t element) const {
    PlaneView view = whole;
    view.data = static_cast<char*>(whole.data) + first * whole.image_stride * element;
    view.images = images;
    if (columns == 0) return view;
    view.images = lanes;
    view.height = rows;
    view.width = columns;
    view.row_stride = columns * lanes * whole.image_stride;
    view.column_stride = lanes * whole.image_stride;
    return view;
  }
};

// `images` of height x width; `fast_blocks`: as in CpuKernels.
std::vector<BatchPart> parts_of_batch(const ConvWeight& weight, std::int64_t images, std::int64_t height,
                                      std::int64_t width, std::int64_t lanes, bool fast_blocks);

}  // namespace curvlab::sparse_conv
