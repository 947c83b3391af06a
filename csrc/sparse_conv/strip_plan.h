// SPDX-License-Identifier: Apache-2.0
// The plan of a mask and geometry: entry lists and layouts for strip.h.
#pragma once

#include <cstdint>
#include <vector>

#include "sparse_conv/masked_conv2d.h"
#include "sparse_conv/strip.h"

namespace curvlab::sparse_conv {

// An EntryList and what it points to. Entry k's value is values[gather[k]].
struct OwnedList {
  std::vector<std::int32_t> offsets, gather, block_begin;
  std::vector<Segment> segments;
  std::vector<std::int64_t> entries_before;
  bool in_order = true;  // gather is 0, 1, 2, ...
  std::int32_t chunk_blocks = 1;
  bool by_dest = false;

  EntryList view() const {
    return {offsets.data(),
            segments.data(),
            block_begin.data(),
            entries_before.data(),
            static_cast<std::int64_t>(entries_before.size()) - 1,
            static_cast<std::int32_t>(block_begin.size()) - 1,
            chunk_blocks,
            by_dest};
  }
};

// One pass of the input gradient.
struct InputPass {
  OwnedList list;
  std::int64_t first_row, first_column, rows, columns;
};

struct CpuPlan {
  ConvWeight weight;
  LaneGrid grid;
  std::int64_t height, width, out_height, out_width;
  std::int64_t entries;
  StripLayout x_layout, grad_layout;
  OwnedList forward;             // of the output, and of the weight gradient
  std::vector<InputPass> input;  // one per phase of the strides
  std::int64_t grad_rows;        // tile rows that cover the input gradient and the output
};

// What a plan needs to know of the kernels and of the elements.
struct PlanTarget {
  std::int64_t lanes, tile, element_size;
  std::int64_t cache_bytes;  // of L1
  bool folded;               // images take the place of columns (BatchPart): the channels of results lie side by side
};

// Whether 32-bit offsets reach everywhere in a strip, and 32-bit positions in the values.
bool plan_fits(const ConvWeight& weight, std::int64_t height, std::int64_t width, std::int64_t nonzeros,
               const PlanTarget& target);

// `grid`: its blocks are those of the plan, whatever the argument's.
CpuPlan make_plan(const ConvWeight& weight, std::int64_t height, std::int64_t width, const LaneGrid& grid,
                  const std::int64_t* indices, std::int64_t nonzeros, const PlanTarget& target);

}  // namespace curvlab::sparse_conv
