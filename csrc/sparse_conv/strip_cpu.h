// SPDX-License-Identifier: Apache-2.0
// One strip: results of a pass, and the weight gradient. Included by cpu_<isa>.cpp only.
#pragma once

#include <cstdint>

#include "sparse_conv/blocks_cpu.h"
#include "sparse_conv/cpu_kernels.h"
#include "sparse_conv/pack_cpu.h"
#include "sparse_conv/strip.h"
#include "sparse_conv/tiles_cpu.h"

namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY {

// Tile shapes: whole result lines first (1 x 16 for wide planes: 1 x 8, 3 x 8 and 4 x 6 lost 10-55 %), then rows.
struct TileShape {
  std::int64_t rows, columns;

  std::int64_t tiles(std::int64_t of_rows, std::int64_t of_columns) const {
    return (of_rows + rows - 1) / rows * ((of_columns + columns - 1) / columns);
  }
};

static TileShape tile_shape(std::int64_t columns) {
  const std::int64_t tiles = (columns + kTile - 1) / kTile;
  const std::int64_t width = larger_of((columns + tiles - 1) / tiles, 1);
  return {larger_of(smaller_of(kTile / width, kMaxTileRows), 1), width};
}

// Packs a chunk of the channels of the rows that the task's tile rows read. Rows that the strip above read too are
// moved: packing them again took a fifth of the time, and lower strips keep both sources in L2.
template <class scalar_t>
static void pack_strip(PlaneView x, const StripLayout& layout, const LaneGrid& grid, const StripTask& task,
                       std::int64_t first_channel, scalar_t* scratch) {
  x.data = static_cast<scalar_t*>(x.data) + first_channel * x.channel_stride;
  x.channels = smaller_of(layout.chunk, x.channels - first_channel);
  std::int64_t first_row = task.t * layout.row_step + layout.first_row, rows = layout.rows(task.tile_rows);
  const std::int64_t kept = layout.reach_rows - layout.row_step;
  if (task.follows && kept > 0) {
    memmove(scratch, scratch + task.tile_rows * layout.row_step * layout.row_pitch,
            static_cast<std::size_t>(kept * layout.row_pitch) * sizeof(scalar_t));
    first_row += kept;
    rows -= kept;
    scratch += kept * layout.row_pitch;
  }
  if (grid.images == Vectors<scalar_t>::kWidth) {
    pack_images(x, layout, task, first_row, rows, scratch);
  } else {
    pack_blocks(x, layout, grid, task, first_row, rows, scratch);
  }
}

// acc [rows][columns][lanes] of one destination channel -> the result.
template <class scalar_t>
static void unpack_tile(const StripPass& pass, const LaneGrid& grid, const LaneResults<scalar_t>& results,
                        const StripTask& task, std::int64_t channel, std::int64_t t, std::int64_t u, std::int64_t rows,
                        std::int64_t columns, const scalar_t* acc) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const PlaneView& dest = pass.dest;
  const std::int64_t column_pitch = results.column_pitch;
  scalar_t* to = static_cast<scalar_t*>(dest.data) + task.first_image * dest.image_stride +
                 channel * dest.channel_stride + pass.first_row * dest.row_stride + t * results.row_pitch +
                 pass.first_column * dest.column_stride + u * column_pitch;
  if (grid.images != kWidth) return unpack_blocks(results, grid, t, u, rows, columns, acc, to);
  if (column_pitch == 1 && columns == dest.row_stride && pass.row_step == 1) {
    unpack_run(acc, rows * columns, to, dest.image_stride, task.images, pass.stream);
    return;
  }
  for (std::int64_t r = 0; r < rows; ++r, acc += columns * kWidth, to += results.row_pitch) {
    if (column_pitch == 1) {
      unpack_run(acc, columns, to, dest.image_stride, task.images, pass.stream);
      continue;
    }
    for (std::int64_t i = 0; i < task.images; ++i) {
      for (std::int64_t c = 0; c < columns; ++c) {
        to[i * dest.image_stride + c * column_pitch] = acc[c * kWidth + i];
      }
    }
  }
}

// Brings what is packed next into L2 while a pass computes, a few lines after each of its `visits` segments of a tile:
// planes come from memory at 14 GB/s, which is otherwise waited for (64 channels of 32 x 32, 98 % zeros: forward 7.1 ms
// instead of 8.2). Does nothing unless the images lie in one piece and share L2 with the packed strip.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const PlaneView& view, std::int64_t first_image, std::int64_t images, std::int64_t element) {
    const std::int64_t last = smaller_of(first_image + images, view.images);
    const std::int64_t image = view.channels * view.height * view.width;
    const bool in_one_piece = view.column_stride == 1 && view.row_stride == view.width &&
                              view.channel_stride == view.height * view.width && view.image_stride == image;
    if (!in_one_piece || last <= first_image || images * image * element > kMostBytes) return;
    at_ = static_cast<const char*>(view.data) + first_image * image * element;
    end_ = static_cast<const char*>(view.data) + last * image * element;
  }

  void spread(std::int64_t visits) { step_ = (end_ - at_ + visits - 1) / larger_of(visits, 1); }

  void visit() {
    goal_ += step_;
    for (; goal_ >= kLine && at_ < end_; goal_ -= kLine, at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr std::int64_t kLine = 64, kMostBytes = 512 * 1024;
  const char *at_ = nullptr, *end_ = nullptr;
  std::int64_t step_ = 0, goal_ = 0;
};

// A range of destination channels.
struct Range {
  std::int64_t begin, end;
};

// The task's part of a list: as many entries in each.
static Range part_of(const EntryList& list, const StripTask& task) {
  if (task.parts == 1) return {0, list.dests};
  Range range{};
  const std::int64_t total = list.entries_before[list.dests] + list.dests;  // a destination costs without entries, too
  for (int side = 0; side < 2; ++side) {
    const std::int64_t goal = total * (task.part + side) / task.parts;
    std::int64_t low = 0, high = list.dests;  // the first destination before which lies the goal
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (list.entries_before[middle] + middle < goal) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    (side == 0 ? range.begin : range.end) = low;
  }
  return range;
}

// The part of an entry list whose source channels are packed.
struct Blocks {
  std::int32_t begin, end;

  static Blocks of_chunk(const EntryList& list, std::int64_t chunk) {
    const std::int64_t begin = smaller_of(chunk * list.chunk_blocks, list.blocks);
    return {static_cast<std::int32_t>(begin),
            static_cast<std::int32_t>(smaller_of(begin + list.chunk_blocks, list.blocks))};
  }
};

// A tile of a pass.
struct Tile {
  std::int64_t t, u, rows, columns;
};

constexpr std::int64_t kSideBySide = 8;  // registers of channels: lines of an image that are written together

// Channels [begin, end) of a tile, `acc` that of channel `begin`, into results whose channels lie side by side.
template <class scalar_t>
static void unpack_side_by_side(const StripPass& pass, const StripTask& task, const Tile& tile, std::int64_t begin,
                                std::int64_t end, const scalar_t* acc) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const PlaneView& dest = pass.dest;
  const std::int64_t positions = tile.rows * tile.columns;
  for (std::int64_t i = 0; i < positions; ++i) {
    scalar_t* to = static_cast<scalar_t*>(dest.data) + task.first_image * dest.image_stride +
                   (pass.first_row + (tile.t + i / tile.columns) * pass.row_step) * dest.row_stride +
                   (pass.first_column + (tile.u + i % tile.columns) * pass.column_step) * dest.column_stride + begin;
    unpack_channels(acc + i * kWidth, positions * kWidth, end - begin, to, dest.image_stride);
  }
}

// Every destination channel of one tile.
template <class scalar_t>
static void correlate_channels(const StripPass& pass, const Blocks& blocks, const LaneGrid& grid,
                               const LaneResults<scalar_t>& results, const StripTask& task, const Range& range,
                               const scalar_t* x, std::int64_t row_pitch, const Tile& tile, Ahead& ahead,
                               scalar_t* acc) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const EntryList& list = pass.list;
  const auto correlate = TileTables<scalar_t>::correlate[tile.rows - 1][tile.columns - 1];
  const scalar_t* values = static_cast<const scalar_t*>(pass.values);
  const scalar_t* bias = static_cast<const scalar_t*>(pass.bias);
  // results whose channels lie side by side are written by groups of them, or when all are there
  const bool side_by_side = pass.dest.channel_stride == 1 && pass.dest.column_stride != 1 && task.images == kWidth;
  const bool by_dest = side_by_side && list.by_dest;
  const std::int64_t acc_pitch = list.blocks == 1 && !side_by_side ? 0 : tile.rows * tile.columns * kWidth;
  std::int64_t group = range.begin;
  for (std::int32_t block = blocks.begin; block < blocks.end; ++block) {
    const bool unpack = block + 1 == list.blocks && !side_by_side;
    const Segment* end = list.segments + list.block_begin[block + 1];
    for (const Segment* segment = list.segments + list.block_begin[block]; segment < end; ++segment) {
      if (segment->dest < range.begin || segment->dest >= range.end) continue;
      scalar_t* sums = acc + (segment->dest - (by_dest ? group : 0)) * acc_pitch;
      correlate(x, row_pitch, list.offsets + segment->begin, values + segment->begin, segment->count, block > 0,
                bias == nullptr ? scalar_t{0} : bias[segment->dest], sums);
      ahead.visit();
      if (unpack) {
        unpack_tile(pass, grid, results, task, segment->dest, tile.t, tile.u, tile.rows, tile.columns, sums);
      } else if (by_dest && (segment->dest + 1 == group + kSideBySide * kWidth || segment->dest + 1 == range.end)) {
        unpack_side_by_side(pass, task, tile, group, segment->dest + 1, acc);
        group = segment->dest + 1;
      }
    }
  }
  if (side_by_side && !by_dest && blocks.end == list.blocks) {
    unpack_side_by_side(pass, task, tile, range.begin, range.end, acc + range.begin * acc_pitch);
  }
}

template <class scalar_t>
static void run_pass(const StripPass& pass, const Blocks& blocks, const StripLayout& layout, const LaneGrid& grid,
                     const StripTask& task, const scalar_t* packed, Ahead ahead, scalar_t* acc) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const std::int64_t block_columns = smaller_of(grid.block_columns, pass.columns);
  const TileShape shape = tile_shape(block_columns);
  const std::int64_t row_pitch = layout.row_step * layout.row_pitch;
  const std::int64_t end = smaller_of(task.t + task.tile_rows, smaller_of(grid.block_rows, pass.rows));
  const Range range = part_of(pass.list, task);
  const LaneResults<scalar_t> results(pass, grid, task);
  ahead.spread(shape.tiles(end - task.t, block_columns) * pass.list.block_begin[pass.list.blocks]);
  for (std::int64_t t = task.t; t < end; t += shape.rows) {
    for (std::int64_t u = 0; u < block_columns; u += shape.columns) {
      const Tile tile{t, u, smaller_of(shape.rows, end - t), smaller_of(shape.columns, block_columns - u)};
      correlate_channels(pass, blocks, grid, results, task, range, packed + (t - task.t) * row_pitch + u * kWidth,
                         row_pitch, tile, ahead, acc);
    }
  }
#if defined(CURVLAB_CPU_CAPABILITY_AVX512) || defined(CURVLAB_CPU_CAPABILITY_AVX2)
  if (pass.stream) _mm_sfence();  // streaming stores are ordered by nothing else
#endif
}

template <class scalar_t>
static void run_dot(const StripDot& dot, const Blocks& blocks, const StripLayout& layout,
                    const StripLayout& grad_layout, const LaneGrid& grid, const StripTask& task, const scalar_t* packed,
                    const scalar_t* packed_grad, Ahead ahead) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const std::int64_t block_columns = smaller_of(grid.block_columns, dot.columns);
  const TileShape shape = tile_shape(block_columns);
  const EntryList& list = dot.list;
  const std::int64_t row_pitch = layout.row_step * layout.row_pitch;
  const std::int64_t end = smaller_of(task.t + task.tile_rows, smaller_of(grid.block_rows, dot.rows));
  const Range range = part_of(list, task);
  scalar_t* sums = static_cast<scalar_t*>(dot.sums);
  // the gradient's own origin (t = u = 0) inside its strip, which reaches further for the input gradient
  const scalar_t* origin =
      packed_grad - grad_layout.first_row * grad_layout.row_pitch - grad_layout.first_column * kWidth;
  ahead.spread(shape.tiles(end - task.t, block_columns) * list.block_begin[list.blocks]);
  for (std::int64_t t = task.t; t < end; t += shape.rows) {
    for (std::int64_t u = 0; u < block_columns; u += shape.columns) {
      const std::int64_t rows = smaller_of(shape.rows, end - t), columns = smaller_of(shape.columns, block_columns - u);
      const auto function = TileTables<scalar_t>::dot[rows - 1][columns - 1];
      const scalar_t* x = packed + (t - task.t) * row_pitch + u * kWidth;
      const scalar_t* grad = origin + (t - task.t) * grad_layout.row_pitch + u * kWidth;
      const Segment* last = list.segments + list.block_begin[blocks.end];
      for (const Segment* segment = list.segments + list.block_begin[blocks.begin]; segment < last; ++segment) {
        if (segment->count == 0 || segment->dest < range.begin || segment->dest >= range.end) continue;
        function(x, row_pitch, grad + segment->dest * grad_layout.channel_pitch, grad_layout.row_pitch,
                 list.offsets + segment->begin, segment->count, sums + segment->begin);
        ahead.visit();
      }
    }
  }
}

// Sums of the gradient's channels over the strip, from what is packed and in L2 (grad.sum would read 32 MB again: 1.2
// of 21 ms, 64 channels of 32 x 32).
template <class scalar_t>
static void sum_channels(const StripDot& dot, const StripLayout& grad_layout, const LaneGrid& grid,
                         const StripTask& task, const scalar_t* packed_grad) {
  typedef typename Vectors<scalar_t>::Lanes Lanes;
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const std::int64_t columns = smaller_of(grid.block_columns, dot.columns);
  const std::int64_t rows = smaller_of(task.tile_rows, smaller_of(grid.block_rows, dot.rows) - task.t);
  scalar_t* sums = static_cast<scalar_t*>(dot.channel_sums);
  const scalar_t* origin =
      packed_grad - grad_layout.first_row * grad_layout.row_pitch - grad_layout.first_column * kWidth;
  for (std::int64_t channel = 0; channel < grad_layout.channels; ++channel) {
    Lanes sum[4] = {};
    for (std::int64_t r = 0; r < rows; ++r) {
      const scalar_t* row = origin + r * grad_layout.row_pitch + channel * grad_layout.channel_pitch;
      for (std::int64_t c = 0; c < columns; ++c) sum[c % 4] += load_vector(row + c * kWidth);
    }
    sums[channel] += sum_vector((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// Packs one chunk of channels after the other and gives each to `use`: its number, and the address that channel 0 of
// the packed strip would have.
template <class scalar_t, class Use>
static void for_each_chunk(const PlaneView& x, const StripLayout& layout, const LaneGrid& grid, const StripTask& task,
                           scalar_t* packed, const Use& use) {
  std::int64_t first = 0, chunk = 0;
  do {  // once without channels, too: results are written all the same
    pack_strip(x, layout, grid, task, first, packed);
    use(chunk++, packed - first * layout.channel_pitch);
    first += layout.chunk;
  } while (first < x.channels);
}

template <class scalar_t>
static void forward_strip(const StripTask& task, const StripWork& work, void* scratch) {
  scalar_t* acc = static_cast<scalar_t*>(scratch);
  scalar_t* packed = acc + work.acc_size;
  Ahead next;
  if (task.last) next = Ahead(work.x, task.first_image + work.grid.images, work.grid.images, sizeof(scalar_t));
  for_each_chunk(work.x, work.x_layout, work.grid, task, packed, [&](std::int64_t chunk, const scalar_t* x) {
    const StripPass& pass = *work.pass;
    run_pass(pass, Blocks::of_chunk(pass.list, chunk), work.x_layout, work.grid, task, x, next, acc);
  });
}

// Input gradient (its passes) and weight gradient (where `dot` is given), which share the packed gradient.
template <class scalar_t>
static void backward_strip(const StripTask& task, const StripWork& work, const StripDot* dot, void* scratch) {
  scalar_t* acc = static_cast<scalar_t*>(scratch);
  scalar_t* packed_grad = acc + work.acc_size;
  Ahead next;
  if (task.last) next = Ahead(work.grad, task.first_image + work.grid.images, work.grid.images, sizeof(scalar_t));
  const bool dots = dot != nullptr && task.t < smaller_of(work.grid.block_rows, dot->rows);
  Ahead between = next;
  if (dots) between = task.t == 0 ? Ahead(work.x, task.first_image, work.grid.images, sizeof(scalar_t)) : Ahead();
  for_each_chunk(work.grad, work.grad_layout, work.grid, task, packed_grad, [&](std::int64_t chunk, const scalar_t* g) {
    for (std::int64_t p = 0; p < work.passes; ++p) {
      const StripPass& pass = work.pass[p];
      const Blocks blocks = Blocks::of_chunk(pass.list, chunk);
      run_pass(pass, blocks, work.grad_layout, work.grid, task, g, p == 0 ? between : Ahead(), acc);
    }
  });
  if (!dots) return;
  if (dot->channel_sums != nullptr) sum_channels(*dot, work.grad_layout, work.grid, task, packed_grad);
  scalar_t* packed = packed_grad + work.grad_size;
  for_each_chunk(work.x, work.x_layout, work.grid, task, packed, [&](std::int64_t chunk, const scalar_t* x) {
    const Blocks blocks = Blocks::of_chunk(dot->list, chunk);
    run_dot(*dot, blocks, work.x_layout, work.grad_layout, work.grid, task, x, packed_grad, next);
  });
}

#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
constexpr bool kFastBlocks = true;
#else
constexpr bool kFastBlocks = false;
#endif

#define CURVLAB_STRIP_TYPES(kernel) {kernel<float>, kernel<double>}
#define CURVLAB_SPARSE_CONV_KERNELS                   \
  {{Vectors<float>::kWidth, Vectors<double>::kWidth}, \
   {kFastBlocks, false},                              \
   kTile,                                             \
   CURVLAB_STRIP_TYPES(forward_strip),                \
   CURVLAB_STRIP_TYPES(backward_strip)}

}  // namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY
