// SPDX-License-Identifier: Apache-2.0
#include "sparse_conv/strip_plan.h"

#include <algorithm>
#include <numeric>

namespace curvlab::sparse_conv {
namespace {

// Entries per block and destination below which blocks cost more (accumulators loaded and stored) than L1 gains.
constexpr double kLeastEntries = 6;
constexpr std::int64_t kChunkBytes = 256 * 1024;  // of packed channels, and of accumulators that blocks come back to

std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Entry {
  std::int32_t dest, channel, offset, position;
};

// Of one destination channel and tile.
std::int64_t accumulator_bytes(const PlanTarget& target) { return target.tile * target.lanes * target.element_size; }

// `most_bytes` of a tile's packed channels; 0: all of them together.
void finish_layout(StripLayout& layout, std::int64_t most_bytes, const PlanTarget& target) {
  layout.phase_pitch = ceil_div(layout.columns, layout.column_step) * target.lanes;
  layout.channel_pitch = layout.column_step * layout.phase_pitch;
  layout.chunk = layout.channels;
  if (most_bytes > 0) {  // a multiple of what is transposed at once; a tile has up to two rows of eight columns
    const std::int64_t most = most_bytes / (2 * layout.channel_pitch * target.element_size);
    layout.chunk = std::min(layout.chunk, std::max<std::int64_t>(most / target.lanes, 1) * target.lanes);
  }
  const std::int64_t line = std::max<std::int64_t>(64 / target.element_size, 1);
  std::int64_t lines = ceil_div(layout.chunk * layout.channel_pitch, line);
  // a tile's rows should not fall into the same sets of the L1 cache (64 sets of 64-byte lines)
  while (lines % 64 < 20 || lines % 64 > 44) ++lines;
  layout.row_pitch = lines * line;
}

// `columns` of the output that a block has.
StripLayout source_of_forward(const ConvWeight& w, std::int64_t columns, const PlanTarget& target) {
  StripLayout layout{};
  layout.channels = w.channels_in();
  layout.row_step = w.stride[0];
  layout.column_step = w.stride[1];
  layout.first_row = -w.padding[0];
  layout.first_column = -w.padding[1];
  layout.reach_rows = (w.kernel[0] - 1) * w.dilation[0] + 1;
  layout.columns = (columns - 1) * w.stride[1] + (w.kernel[1] - 1) * w.dilation[1] + 1;
  // images in place of columns leave many channels to a tile; their accumulators stay in L2 from chunk to chunk
  const bool chunks = target.folded && w.channels_out * accumulator_bytes(target) <= kChunkBytes;
  finish_layout(layout, chunks ? kChunkBytes : 0, target);
  return layout;
}

// Least and largest shift rho of the input gradient along an axis, and 0, which the weight gradient reads.
struct Reach {
  std::int64_t first, last;
};

Reach reach_of_input(const ConvWeight& w, int axis) {
  const std::int64_t first = floor_div(w.padding[axis] - (w.kernel[axis] - 1) * w.dilation[axis], w.stride[axis]);
  const std::int64_t last = floor_div(w.stride[axis] - 1 + w.padding[axis], w.stride[axis]);
  return {std::min<std::int64_t>(first, 0), std::max<std::int64_t>(last, 0)};
}

// `columns` of a phase of the input and `out_columns` of the output that a block has.
StripLayout source_of_input(const ConvWeight& w, std::int64_t columns_of_phase, std::int64_t out_columns,
                            const PlanTarget& target) {
  const Reach rows = reach_of_input(w, 0), columns = reach_of_input(w, 1);
  StripLayout layout{};
  layout.channels = w.channels_out;
  layout.row_step = layout.column_step = 1;
  layout.first_row = rows.first;
  layout.first_column = columns.first;
  layout.reach_rows = rows.last - rows.first + 1;
  layout.columns = std::max(columns_of_phase - 1 + columns.last, out_columns - 1) - columns.first + 1;
  finish_layout(layout, 0, target);
  return layout;
}

// Source channels of a block: as many as keep a tile's window in L1, or all of a chunk where too few entries would be
// left, or more accumulators than L2 holds.
std::int64_t block_channels(const StripLayout& layout, std::int64_t columns, std::int64_t channels_per_dest,
                            double entries_per_dest, std::int64_t dests, std::int64_t kernel_columns,
                            const PlanTarget& target) {
  const std::int64_t tiles = std::max<std::int64_t>(ceil_div(columns, target.tile), 1);
  const std::int64_t tile_columns = std::max<std::int64_t>(ceil_div(columns, tiles), 1);
  const std::int64_t tile_rows = std::clamp<std::int64_t>(target.tile / tile_columns, 1, 4);
  const std::int64_t window = ((tile_rows - 1) * layout.row_step + layout.reach_rows) *
                              (tile_columns + kernel_columns - 1) * target.lanes * target.element_size;
  // of 48 KB, windows of 20, 26, 32 and 40 KB took 56, 55, 52 and 49 ms (64 -> 64 channels at 32 x 32, 90 % zeros)
  const std::int64_t channels = std::max<std::int64_t>(target.cache_bytes * 7 / 8 / window, 1);
  const std::int64_t blocks = ceil_div(std::max<std::int64_t>(channels_per_dest, 1), channels);
  if (blocks <= 1 || entries_per_dest / static_cast<double>(blocks) < kLeastEntries) return layout.chunk;
  if (layout.chunk == layout.channels) {
    if (target.folded && dests * accumulator_bytes(target) > kChunkBytes) return layout.chunk;
    return ceil_div(channels_per_dest, blocks);
  }
  std::int64_t block = layout.chunk;  // which blocks divide
  while (block % 2 == 0 && block > channels) block /= 2;
  return block;
}

OwnedList make_list(std::vector<Entry> entries, std::int64_t dests, const StripLayout& layout, std::int64_t block,
                    const PlanTarget& target) {
  const std::int64_t channels = layout.channels;
  block = std::max<std::int64_t>(block, 1);
  const std::int64_t blocks = std::max<std::int64_t>(ceil_div(channels, block), 1);
  // stable: within a block and destination by position of the source, as they came
  std::stable_sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
    const std::int64_t x = a.channel / block, y = b.channel / block;
    return x != y ? x < y : a.dest < b.dest;
  });
  OwnedList list;
  list.chunk_blocks = static_cast<std::int32_t>(std::max<std::int64_t>(ceil_div(layout.chunk, block), 1));
  list.by_dest = target.folded && blocks == 1;
  list.block_begin.push_back(0);
  list.entries_before.assign(static_cast<std::size_t>(dests) + 1, 0);
  for (const Entry& entry : entries) ++list.entries_before[static_cast<std::size_t>(entry.dest) + 1];
  std::partial_sum(list.entries_before.begin(), list.entries_before.end(), list.entries_before.begin());
  std::size_t k = 0;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::size_t first = list.segments.size();
    for (std::int64_t dest = 0; dest < dests; ++dest) {
      const std::size_t begin = k;
      while (k < entries.size() && entries[k].channel / block == b && entries[k].dest == dest) ++k;
      if (k > begin || b == 0 || b + 1 == blocks) {
        list.segments.push_back(
            {static_cast<std::int32_t>(dest), static_cast<std::int32_t>(begin), static_cast<std::int32_t>(k - begin)});
      }
    }
    if (!list.by_dest)
      std::stable_sort(list.segments.begin() + static_cast<std::ptrdiff_t>(first), list.segments.end(),
                       [](const Segment& a, const Segment& b) { return a.count < b.count; });
    list.block_begin.push_back(static_cast<std::int32_t>(list.segments.size()));
  }
  for (const Entry& entry : entries) {
    list.in_order = list.in_order && entry.position == static_cast<std::int32_t>(list.gather.size());
    list.offsets.push_back(entry.offset);
    list.gather.push_back(entry.position);
  }
  return list;
}

// One nonzero, taken apart.
struct Tap {
  std::int64_t out, in, row, column;
};

Tap tap_at(const ConvWeight& w, std::int64_t index) {
  const std::int64_t column = index % w.kernel[1], row = index / w.kernel[1] % w.kernel[0];
  const std::int64_t out = index / (w.taps() * w.channels_in_group);
  const std::int64_t group = out / (w.channels_out / w.groups);
  return {out, group * w.channels_in_group + index / w.taps() % w.channels_in_group, row, column};
}

OwnedList forward_list(const CpuPlan& plan, const std::int64_t* indices, const PlanTarget& target) {
  const ConvWeight& w = plan.weight;
  const StripLayout& layout = plan.x_layout;
  std::vector<Entry> entries;
  entries.reserve(static_cast<std::size_t>(plan.entries));
  for (std::int64_t k = 0; k < plan.entries; ++k) {
    const Tap tap = tap_at(w, indices[k]);
    const std::int64_t column = tap.column * w.dilation[1];
    const std::int64_t offset = tap.row * w.dilation[0] * layout.row_pitch + tap.in * layout.channel_pitch +
                                column % layout.column_step * layout.phase_pitch +
                                column / layout.column_step * target.lanes;
    entries.push_back({static_cast<std::int32_t>(tap.out), static_cast<std::int32_t>(tap.in),
                       static_cast<std::int32_t>(offset), static_cast<std::int32_t>(k)});
  }
  const double per_dest =
      static_cast<double>(plan.entries) / static_cast<double>(std::max<std::int64_t>(w.channels_out, 1));
  const std::int64_t columns = std::min(plan.out_width, plan.grid.block_columns);
  const std::int64_t block =
      block_channels(layout, columns, w.channels_in_group, per_dest, w.channels_out, w.kernel[1], target);
  return make_list(std::move(entries), w.channels_out, layout, block, target);
}

InputPass input_pass(const CpuPlan& plan, std::int64_t phase_row, std::int64_t phase_column,
                     const std::int64_t* indices, const PlanTarget& target) {
  const ConvWeight& w = plan.weight;
  const StripLayout& layout = plan.grad_layout;
  std::vector<Entry> entries;
  for (std::int64_t k = 0; k < plan.entries; ++k) {
    const Tap tap = tap_at(w, indices[k]);
    const std::int64_t row = phase_row + w.padding[0] - tap.row * w.dilation[0];
    const std::int64_t column = phase_column + w.padding[1] - tap.column * w.dilation[1];
    if (row % w.stride[0] != 0 || column % w.stride[1] != 0) continue;
    const std::int64_t offset = (row / w.stride[0] - layout.first_row) * layout.row_pitch +
                                tap.out * layout.channel_pitch +
                                (column / w.stride[1] - layout.first_column) * target.lanes;
    entries.push_back({static_cast<std::int32_t>(tap.in), static_cast<std::int32_t>(tap.out),
                       static_cast<std::int32_t>(offset), static_cast<std::int32_t>(k)});
  }
  InputPass pass{{},
                 phase_row,
                 phase_column,
                 ceil_div(plan.height - phase_row, w.stride[0]),
                 ceil_div(plan.width - phase_column, w.stride[1])};
  const std::int64_t channels = w.channels_in();
  const double per_dest =
      static_cast<double>(entries.size()) / static_cast<double>(std::max<std::int64_t>(channels, 1));
  const std::int64_t columns = std::min(pass.columns, plan.grid.block_columns);
  const std::int64_t block =
      block_channels(layout, columns, w.channels_out / w.groups, per_dest, channels, w.kernel[1], target);
  pass.list = make_list(std::move(entries), channels, layout, block, target);
  return pass;
}

}  // namespace

bool plan_fits(const ConvWeight& weight, std::int64_t height, std::int64_t width, std::int64_t nonzeros,
               const PlanTarget& target) {
  constexpr std::int64_t kMost = INT32_MAX;
  if (nonzeros > kMost || weight.channels_out > kMost || weight.channels_in() > kMost) return false;
  const std::int64_t out_width = output_size(weight, width, 1);  // no block is wider
  const StripLayout x = source_of_forward(weight, out_width, target);
  const StripLayout grad = source_of_input(weight, ceil_div(width, weight.stride[1]), out_width, target);
  (void)height;
  const auto fits = [&](const StripLayout& layout) {  // offsets count from channel 0, whatever the chunk
    return std::max(layout.row_pitch, layout.channels * layout.channel_pitch) < kMost / layout.reach_rows;
  };
  return fits(x) && fits(grad);
}

CpuPlan make_plan(const ConvWeight& weight, std::int64_t height, std::int64_t width, const LaneGrid& grid,
                  const std::int64_t* indices, std::int64_t nonzeros, const PlanTarget& target) {
  CpuPlan plan;
  plan.weight = weight;
  plan.height = height;
  plan.width = width;
  plan.out_height = output_size(weight, height, 0);
  plan.out_width = output_size(weight, width, 1);
  plan.entries = nonzeros;
  const std::int64_t columns_of_phase = ceil_div(width, weight.stride[1]);
  plan.grad_rows = std::max(ceil_div(height, weight.stride[0]), plan.out_height);
  plan.grid = grid;
  plan.grid.block_rows = ceil_div(plan.grad_rows, grid.rows);
  plan.grid.block_columns = ceil_div(std::max(columns_of_phase, plan.out_width), grid.columns);
  const std::int64_t out_columns = std::min(plan.grid.block_columns, plan.out_width);
  plan.x_layout = source_of_forward(weight, out_columns, target);
  plan.grad_layout = source_of_input(weight, std::min(plan.grid.block_columns, columns_of_phase), out_columns, target);
  plan.forward = forward_list(plan, indices, target);
  for (std::int64_t row = 0; row < std::min(weight.stride[0], height); ++row) {
    for (std::int64_t column = 0; column < std::min(weight.stride[1], width); ++column) {
      plan.input.push_back(input_pass(plan, row, column, indices, target));
    }
  }
  return plan;
}

}  // namespace curvlab::sparse_conv
