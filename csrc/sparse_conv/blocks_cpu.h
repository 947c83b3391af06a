// SPDX-License-Identifier: Apache-2.0
// Between tensors and the scratch of a strip whose lanes are blocks of planes (LaneGrid). Included by cpu_<isa>.cpp
// only.
#pragma once

#include <cstdint>

#include "sparse_conv/cpu_kernels.h"
#include "sparse_conv/pack_cpu.h"
#include "sparse_conv/strip.h"
#include "sparse_conv/tiles_cpu.h"
#include "sparse_conv/transpose_cpu.h"

namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY {

// Where a lane's block lies: its image and the steps to it from block (0, 0).
struct LanePlace {
  std::int64_t image, row, column;  // row and column of the grid
};

inline __attribute__((always_inline)) LanePlace place_of(const LaneGrid& grid, int lane) {
  const int rows = static_cast<int>(grid.rows), columns = static_cast<int>(grid.columns);
  return {lane / (rows * columns), lane / columns % rows, lane % columns};
}

// Lanes moved by one block to the right (`side` -1) or left (1); zeros come in from outside the planes.
template <class scalar_t>
class BlockShift {
 public:
  static constexpr int kWidth = Vectors<scalar_t>::kWidth;

  BlockShift(const LaneGrid& grid, int side) {
    const std::int64_t end = side < 0 ? 0 : grid.columns - 1;
    for (int lane = 0; lane < kWidth; ++lane) {
      const bool inside = lane % grid.columns != end;
      source_[lane] = inside ? lane + side : 0;
      inside_ |= static_cast<unsigned>(inside) << lane;
    }
  }

  void operator()(const scalar_t* from, scalar_t* to) const {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
    if constexpr (kWidth == 16) {
      const __m512i source = _mm512_loadu_si512(source_);
      const auto inside = static_cast<__mmask16>(inside_);
      _mm512_storeu_ps(to, _mm512_maskz_permutexvar_ps(inside, source, _mm512_loadu_ps(from)));
      return;
    }
#endif
    for (int lane = 0; lane < kWidth; ++lane) to[lane] = inside_ >> lane & 1 ? from[source_[lane]] : scalar_t{0};
  }

 private:
  std::int32_t source_[kWidth];
  unsigned inside_ = 0;
};

constexpr std::int64_t kRowsAtOnce = 16;  // packed rows whose lanes' sources are looked up together

// Sources of the lanes of packed rows: pointers into a channel, or to zeros that no step leaves.
template <class scalar_t>
struct LaneSources {
  static constexpr int kWidth = Vectors<scalar_t>::kWidth;
  alignas(64) scalar_t zeros[kMostBlockColumns];
  const scalar_t* base[kRowsAtOnce][kWidth];
  std::int64_t channel_stride[kRowsAtOnce][kWidth];
  // Four lanes beside each other lie alike in all of their quarters of the grid: base[r][4 q] + step[k] is lane 4 q +
  // k, where the row is `regular`. Seven registers hold that, sixteen pointers they do not.
  std::int64_t step[4] = {};
  bool regular[kRowsAtOnce];

  LaneSources() { memset(zeros, 0, sizeof zeros); }

  void look_up(const PlaneView& x, const StripLayout& layout, const LaneGrid& grid, const StripTask& task,
               std::int64_t first_row, std::int64_t rows) {
    for (std::int64_t r = 0; r < rows; ++r) regular[r] = kWidth % 4 == 0;
    for (int lane = 0; lane < kWidth; ++lane) {
      const LanePlace place = place_of(grid, lane);
      const std::int64_t from_row = place.row * grid.block_rows * layout.row_step;
      const std::int64_t offset = (task.first_image + place.image) * x.image_stride + from_row * x.row_stride +
                                  place.column * grid.block_columns * layout.column_step * x.column_stride;
      if (lane == 0) first_ = offset;
      if (lane < 4) step[lane] = offset - first_;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = first_row + r + from_row;
        const bool there = place.image < task.images && row >= 0 && row < x.height;
        base[r][lane] = there ? static_cast<const scalar_t*>(x.data) + offset + (first_row + r) * x.row_stride : zeros;
        channel_stride[r][lane] = there ? x.channel_stride : 0;
        regular[r] = regular[r] && base[r][lane] == base[r][lane / 4 * 4] + (there ? step[lane % 4] : 0) &&
                     (there || step[3] + grid.block_columns <= kMostBlockColumns);
      }
    }
  }

 private:
  std::int64_t first_ = 0;
};

// Whether blocks tile the plane's columns, four of which can be taken at a time, and halos come from the next block.
inline bool blocks_tile_rows(const PlaneView& x, const StripLayout& layout, const LaneGrid& grid) {
  const std::int64_t last = layout.first_column + layout.columns;
  return x.column_stride == 1 && layout.column_step == 1 && grid.columns * grid.block_columns == x.width &&
         grid.block_columns >= 4 && grid.block_columns <= kMostBlockColumns && layout.first_column <= 0 &&
         -layout.first_column <= grid.block_columns && last >= grid.block_columns && last <= 2 * grid.block_columns;
}

// One packed row of one channel: its blocks' columns, then the halos from the blocks beside them.
template <class scalar_t, class From>
CURVLAB_INLINE void pack_block_row(const From& from, std::int64_t width, std::int64_t left, std::int64_t right,
                                   const BlockShift<scalar_t>& from_left, const BlockShift<scalar_t>& from_right,
                                   scalar_t* to) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  for (std::int64_t column = 0; column < width; column += 4) {
    const std::int64_t at = smaller_of(column, width - 4);  // the last ones look back
    transpose_four<scalar_t>(from, at, to + at * kWidth);
  }
  for (std::int64_t c = -left; c < 0; ++c) from_left(to + (width + c) * kWidth, to + c * kWidth);
  for (std::int64_t c = width; c < width + right; ++c) from_right(to + (c - width) * kWidth, to + c * kWidth);
}

template <class scalar_t>
static void pack_block_rows(const PlaneView& x, const StripLayout& layout, const LaneGrid& grid, const StripTask& task,
                            std::int64_t first_row, std::int64_t rows, scalar_t* scratch) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const std::int64_t width = grid.block_columns, left = -layout.first_column, right = layout.columns - left - width;
  // of lanes beside each other, those in one line of 64 bytes; the channel after the next one
  const int shared = grid.columns % 2 == 0 && width * static_cast<std::int64_t>(sizeof(scalar_t)) <= 32 ? 2 : 1;
  const std::int64_t ahead = 2 * x.channel_stride;
  const BlockShift<scalar_t> from_left(grid, -1), from_right(grid, 1);
  LaneSources<scalar_t> sources;
  for (std::int64_t r0 = 0; r0 < rows; r0 += kRowsAtOnce) {
    const std::int64_t count = smaller_of(kRowsAtOnce, rows - r0);
    sources.look_up(x, layout, grid, task, first_row + r0, count);
    for (std::int64_t channel = 0; channel < x.channels; ++channel) {
      for (std::int64_t r = 0; r < count; ++r) {
        const auto lane_source = [&](int lane) {
          return sources.base[r][lane] + channel * sources.channel_stride[r][lane];
        };
        scalar_t* to = scratch + (r0 + r) * layout.row_pitch + channel * layout.channel_pitch + left * kWidth;
        if constexpr (kWidth == 16) {
          if (sources.regular[r]) {
            const scalar_t *a = lane_source(0), *b = lane_source(4), *c = lane_source(8), *d = lane_source(12);
            const std::int64_t step[4] = {0, sources.step[1], sources.step[2], sources.step[3]};
            for (int k = 0; k < 4; k += shared) {
              prefetch_far(a + step[k], ahead);
              prefetch_far(b + step[k], ahead);
              prefetch_far(c + step[k], ahead);
              prefetch_far(d + step[k], ahead);
            }
            const auto from = [&](int lane) __attribute__((always_inline)) {
              return (lane < 4 ? a : lane < 8 ? b : lane < 12 ? c : d) + step[lane % 4];
            };
            pack_block_row(from, width, left, right, from_left, from_right, to);
            continue;
          }
        }
        const scalar_t* lanes[kWidth];
        for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane_source(lane);
        for (int lane = 0; lane < kWidth; lane += shared) prefetch_far(lanes[lane], ahead);
        pack_block_row([&](int lane) { return lanes[lane]; }, width, left, right, from_left, from_right, to);
      }
    }
  }
}

// Channels that follow one another in memory (channels last): a register's width of them at a time.
template <class scalar_t>
static void pack_block_channels(const PlaneView& x, const StripLayout& layout, const LaneGrid& grid,
                                const StripTask& task, std::int64_t first_row, std::int64_t rows, scalar_t* scratch) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const PackedColumns columns{layout, kWidth};
  LaneSources<scalar_t> sources;
  for (std::int64_t r0 = 0; r0 < rows; r0 += kRowsAtOnce) {
    const std::int64_t count = smaller_of(kRowsAtOnce, rows - r0);
    sources.look_up(x, layout, grid, task, first_row + r0, count);
    for (std::int64_t r = 0; r < count; ++r) {
      for (std::int64_t c = layout.first_column; c < layout.first_column + layout.columns; ++c) {
        const scalar_t* lanes[kWidth];
        std::int64_t step[kWidth];
        for (int lane = 0; lane < kWidth; ++lane) {
          const std::int64_t column = c + lane % grid.columns * grid.block_columns * layout.column_step;
          const bool there = sources.channel_stride[r][lane] != 0 && column >= 0 && column < x.width;
          lanes[lane] = there ? sources.base[r][lane] + c * x.column_stride : sources.zeros;
          step[lane] = there ? 1 : 0;
        }
        scalar_t* to = scratch + (r0 + r) * layout.row_pitch + columns.at(c);
        for (std::int64_t channel = 0; channel < x.channels; channel += kWidth) {
          const std::int64_t at = smaller_of(channel, x.channels - kWidth);  // the last ones look back
          transpose_rows<scalar_t, false>([&](int lane) { return lanes[lane] + at * step[lane]; },
                                          to + at * layout.channel_pitch, layout.channel_pitch);
        }
      }
    }
  }
}

// Any strides and steps.
template <class scalar_t>
static void pack_block_lanes(const PlaneView& x, const StripLayout& layout, const LaneGrid& grid, const StripTask& task,
                             std::int64_t first_row, std::int64_t rows, scalar_t* scratch) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const PackedColumns columns{layout, kWidth};
  for (int lane = 0; lane < kWidth; ++lane) {
    const LanePlace place = place_of(grid, lane);
    const std::int64_t ahead = place.column * grid.block_columns * layout.column_step;
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t row = first_row + r + place.row * grid.block_rows * layout.row_step;
      const bool there = place.image < task.images && row >= 0 && row < x.height;
      for (std::int64_t channel = 0; channel < x.channels; ++channel) {
        const scalar_t* from = static_cast<const scalar_t*>(x.data);
        if (there) {
          from += (task.first_image + place.image) * x.image_stride + row * x.row_stride + channel * x.channel_stride;
        }
        scalar_t* to = scratch + r * layout.row_pitch + channel * layout.channel_pitch + lane;
        for (std::int64_t c = layout.first_column; c < layout.first_column + layout.columns; ++c) {
          const std::int64_t column = c + ahead;
          to[columns.at(c)] = there && column >= 0 && column < x.width ? from[column * x.column_stride] : scalar_t{0};
        }
      }
    }
  }
}

// Packs rows [first_row, first_row + rows), counted from block row 0, of the task's images.
template <class scalar_t>
static void pack_blocks(const PlaneView& x, const StripLayout& layout, const LaneGrid& grid, const StripTask& task,
                        std::int64_t first_row, std::int64_t rows, scalar_t* scratch) {
  if (blocks_tile_rows(x, layout, grid)) {
    pack_block_rows(x, layout, grid, task, first_row, rows, scratch);
  } else if (x.channel_stride == 1 && x.channels >= Vectors<scalar_t>::kWidth) {
    pack_block_channels(x, layout, grid, task, first_row, rows, scratch);
  } else {
    pack_block_lanes(x, layout, grid, task, first_row, rows, scratch);
  }
}

// ---- results: acc [rows][columns][lanes] of one destination channel
// What the tiles of a pass share: where the lanes' results lie, from lane 0's on.
template <class scalar_t>
struct LaneResults {
  static constexpr int kWidth = Vectors<scalar_t>::kWidth;
  std::int64_t row_pitch, column_pitch;  // from result to result
  std::int64_t offset[kWidth];
  std::int64_t rows[kWidth], columns[kWidth];  // results that a lane has: those of the last blocks may be fewer
  bool whole;                                  // every block lies inside its plane, every image is there
  bool rows_follow;                            // a block's rows follow one another in memory
  bool streams;                                // whole lines are aligned

  LaneResults(const StripPass& pass, const LaneGrid& grid, const StripTask& task)
      : row_pitch(pass.row_step * pass.dest.row_stride), column_pitch(pass.column_step * pass.dest.column_stride) {
    const PlaneView& dest = pass.dest;
    for (int lane = 0; lane < kWidth; ++lane) {
      const LanePlace place = place_of(grid, lane);
      offset[lane] = place.image * dest.image_stride + place.row * grid.block_rows * row_pitch +
                     place.column * grid.block_columns * column_pitch;
      rows[lane] = place.image < task.images ? pass.rows - place.row * grid.block_rows : 0;
      columns[lane] = pass.columns - place.column * grid.block_columns;
    }
    whole = task.images == grid.images && grid.rows * grid.block_rows == pass.rows &&
            grid.columns * grid.block_columns == pass.columns;
    rows_follow = column_pitch == 1 && row_pitch == grid.block_columns;
    const std::int64_t steps = dest.image_stride | dest.channel_stride | grid.block_rows * row_pitch |
                               (rows_follow ? 16 : row_pitch) | (grid.block_columns % 16 == 0 ? grid.block_columns : 0);
    streams = pass.stream && reinterpret_cast<std::uintptr_t>(dest.data) % 64 == 0 &&
              steps * static_cast<std::int64_t>(sizeof(scalar_t)) % 64 == 0;
  }
};

template <class scalar_t>
static void unpack_lanes(const scalar_t* acc, const LaneResults<scalar_t>& results, std::int64_t t, std::int64_t u,
                         std::int64_t rows, std::int64_t columns, scalar_t* to) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  if constexpr (kWidth == 16) {
    if (results.column_pitch == 1 && rows * columns <= 16) {
      alignas(64) scalar_t block[16 * 16];  // of each lane
      transpose<scalar_t, false>(acc, 16, block, 16);
      for (int lane = 0; lane < 16; ++lane) {
        const std::int64_t rows_there = smaller_of(rows, results.rows[lane] - t);
        const std::int64_t columns_there = larger_of(smaller_of(columns, results.columns[lane] - u), 0);
        const auto there = static_cast<__mmask16>((1u << columns_there) - 1);
        scalar_t* out = to + results.offset[lane];
        for (std::int64_t r = 0; r < rows_there; ++r, out += results.row_pitch) {
          const __m512 row = _mm512_maskz_loadu_ps(there, block + 16 * lane + r * columns);
          _mm512_mask_storeu_ps(out, there, row);
        }
      }
      return;
    }
  }
#endif
  for (int lane = 0; lane < kWidth; ++lane) {
    const std::int64_t rows_there = smaller_of(rows, results.rows[lane] - t);
    const std::int64_t columns_there = smaller_of(columns, results.columns[lane] - u);
    scalar_t* out = to + results.offset[lane];
    for (std::int64_t r = 0; r < rows_there; ++r) {
      for (std::int64_t c = 0; c < columns_there; ++c) {
        out[r * results.row_pitch + c * results.column_pitch] = acc[(r * columns + c) * kWidth + lane];
      }
    }
  }
}

#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
// Sixteen results of every lane as whole lines: `columns` of one block's row follow one another, and the rows of the
// blocks beside it.
template <int columns, bool stream>
CURVLAB_INLINE void unpack_lines(const float* acc, const LaneResults<float>& results, float* to) {
  __m512 r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(acc + 16 * i);
  transpose_quarters(r);  // r[4 g + c], quarter q: results 4 g .. 4 g + 3 of lane 4 q + c
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    // the four pieces of a line: of one lane, of two lanes beside each other, or of four
    constexpr int kAcross = 16 / columns;                                // lanes of a line
    const int lane = kAcross == 1 ? m : kAcross == 2 ? 2 * (m % 2) : 0;  // the first, of four
    const int row = kAcross == 1 ? 0 : kAcross == 2 ? m / 2 : m;
    __m512 rows[4];
    if constexpr (kAcross == 1) {
      regroup_quarters(r[lane], r[4 + lane], r[8 + lane], r[12 + lane], rows);
    } else if constexpr (kAcross == 2) {
      regroup_quarters(r[8 * row + lane], r[8 * row + 4 + lane], r[8 * row + lane + 1], r[8 * row + 4 + lane + 1],
                       rows);
    } else {
      regroup_quarters(r[4 * row], r[4 * row + 1], r[4 * row + 2], r[4 * row + 3], rows);
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      store_floats<stream>(to + results.offset[4 * q + lane] + row * results.row_pitch, rows[q]);
    }
  }
}

template <bool stream>
static bool unpack_whole_lines(const float* acc, const LaneResults<float>& results, const LaneGrid& grid,
                               std::int64_t columns, float* to) {
  if (columns == 16 || (results.rows_follow && columns == grid.block_columns)) {
    unpack_lines<16, stream>(acc, results, to);
  } else if (columns == 8 && grid.block_columns == 8 && grid.columns % 2 == 0) {
    unpack_lines<8, stream>(acc, results, to);
  } else if (columns == 4 && grid.block_columns == 4 && grid.columns % 4 == 0) {
    unpack_lines<4, stream>(acc, results, to);
  } else {
    return false;
  }
  return true;
}
#endif

// `to`: lane 0's first result of the tile.
template <class scalar_t>
static void unpack_blocks(const LaneResults<scalar_t>& results, const LaneGrid& grid, std::int64_t t, std::int64_t u,
                          std::int64_t rows, std::int64_t columns, const scalar_t* acc, scalar_t* to) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(scalar_t) == sizeof(float)) {
    if (rows * columns == 16 && results.column_pitch == 1 && results.whole) {
      if (results.streams ? unpack_whole_lines<true>(acc, results, grid, columns, to)
                          : unpack_whole_lines<false>(acc, results, grid, columns, to)) {
        return;
      }
    }
  }
#endif
  unpack_lanes(acc, results, t, u, rows, columns, to);
}

}  // namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY
