// SPDX-License-Identifier: Apache-2.0
// Between tensors and the scratch of a strip whose lanes are whole images. Included by cpu_<isa>.cpp only.
#pragma once

#include <cstdint>

#include "sparse_conv/cpu_kernels.h"
#include "sparse_conv/strip.h"
#include "sparse_conv/tiles_cpu.h"
#include "sparse_conv/transpose_cpu.h"

namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY {

// Where the columns of one packed row lie, by source column.
struct PackedColumns {
  const StripLayout& layout;
  std::int64_t width;  // lanes

  std::int64_t at(std::int64_t column) const {
    const std::int64_t shifted = column - layout.first_column;
    if (layout.column_step == 1) return shifted * width;
    return shifted % layout.column_step * layout.phase_pitch + shifted / layout.column_step * width;
  }
};

// The part of a plane that a strip holds.
struct PackedPart {
  std::int64_t row_begin, row_end, column_begin, column_end;  // source coordinates
};

inline __attribute__((always_inline)) std::int64_t larger_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
inline __attribute__((always_inline)) std::int64_t smaller_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Into L2. Through an integer: the address may lie behind the tensor, which a prefetch forgives and pointer arithmetic
// does not.
template <class scalar_t>
CURVLAB_INLINE void prefetch_far(const scalar_t* pointer, std::int64_t elements) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(pointer) +
                                                   static_cast<std::uintptr_t>(elements) * sizeof(scalar_t)),
                     0, 2);
}

// One channel whose rows follow one another in memory: kWidth positions of all images at a time, which may span rows.
// `ahead` leads to the next channel: runs of a strip are too short for the processor's own prefetching (64 channels of
// 32 x 32, two sources of 32 MB: 12.5 ms without, 10.4 ms with).
template <class scalar_t>
static void pack_dense_rows(const scalar_t* source, std::int64_t image_stride, std::int64_t ahead,
                            const PackedPart& part, const PackedColumns& columns, std::int64_t plane_width,
                            scalar_t* rows, std::int64_t row_pitch) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  alignas(64) scalar_t block[kWidth * kWidth];
  std::int64_t row = part.row_begin, column = 0;
  const std::int64_t begin = part.row_begin * plane_width, end = part.row_end * plane_width;
  for (std::int64_t position = begin; position < end; position += kWidth) {
    const std::int64_t from = smaller_of(position, end - kWidth);  // the last one looks back
    for (int i = 0; i < kWidth; ++i) prefetch_far(source + from + i * image_stride, ahead);
    if (columns.layout.column_step == 1 && column >= part.column_begin && column + kWidth <= part.column_end) {
      transpose<scalar_t, false>(source + from, image_stride, rows + columns.at(column), kWidth);
      column += kWidth;
      if (column == plane_width) {
        column = 0;
        ++row;
        rows += row_pitch;
      }
      continue;
    }
    transpose<scalar_t, false>(source + from, image_stride, block, kWidth);
    for (int j = static_cast<int>(position - from); j < kWidth; ++j) {
      if (column >= part.column_begin && column < part.column_end) {
        store_vector(rows + columns.at(column), load_vector(block + j * kWidth));
      }
      if (++column == plane_width) {
        column = 0;
        ++row;
        rows += row_pitch;
      }
    }
  }
}

// All channels, which follow one another in memory (channels last): kWidth channels of all images at a time.
template <class scalar_t>
static void pack_dense_channels(const scalar_t* source, const PlaneView& x, const PackedPart& part,
                                const PackedColumns& columns, scalar_t* rows) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const StripLayout& layout = columns.layout;
  for (std::int64_t row = part.row_begin; row < part.row_end; ++row, rows += layout.row_pitch) {
    for (std::int64_t column = part.column_begin; column < part.column_end; ++column) {
      const scalar_t* from = source + row * x.row_stride + column * x.column_stride;
      scalar_t* to = rows + columns.at(column);
      for (std::int64_t channel = 0; channel < x.channels; channel += kWidth) {
        const std::int64_t at = smaller_of(channel, x.channels - kWidth);
        transpose<scalar_t, false>(from + at, x.image_stride, to + at * layout.channel_pitch, layout.channel_pitch);
      }
    }
  }
}

template <class scalar_t>
static void pack_any(const scalar_t* source, const PlaneView& x, std::int64_t images, const PackedPart& part,
                     const PackedColumns& columns, scalar_t* rows) {
  const StripLayout& layout = columns.layout;
  for (std::int64_t row = part.row_begin; row < part.row_end; ++row, rows += layout.row_pitch) {
    for (std::int64_t channel = 0; channel < x.channels; ++channel) {
      const scalar_t* from = source + row * x.row_stride + channel * x.channel_stride;
      scalar_t* to = rows + channel * layout.channel_pitch;
      for (std::int64_t column = part.column_begin; column < part.column_end; ++column) {
        scalar_t* lanes = to + columns.at(column);
        for (std::int64_t image = 0; image < images; ++image) {
          lanes[image] = from[image * x.image_stride + column * x.column_stride];
        }
        for (std::int64_t image = images; image < columns.width; ++image) lanes[image] = 0;
      }
    }
  }
}

// Zeros where the strip reaches out of the planes.
template <class scalar_t>
static void clear_borders(const PlaneView& x, const StripLayout& layout, std::int64_t first_row, std::int64_t rows,
                          const PackedPart& part, scalar_t* scratch) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const PackedColumns columns{layout, kWidth};
  const std::int64_t last_column = layout.first_column + layout.columns;
  for (std::int64_t row = first_row; row < first_row + rows; ++row) {
    scalar_t* to = scratch + (row - first_row) * layout.row_pitch;
    if (row < part.row_begin || row >= part.row_end) {
      memset(to, 0, static_cast<std::size_t>(layout.channels * layout.channel_pitch) * sizeof(scalar_t));
      continue;
    }
    for (std::int64_t channel = 0; channel < x.channels; ++channel, to += layout.channel_pitch) {
      const typename Vectors<scalar_t>::Lanes zero{};
      for (std::int64_t c = layout.first_column; c < part.column_begin; ++c) store_vector(to + columns.at(c), zero);
      for (std::int64_t c = part.column_end; c < last_column; ++c) store_vector(to + columns.at(c), zero);
    }
  }
}

// Packs rows [first_row, first_row + rows) of the task's images.
template <class scalar_t>
static void pack_images(const PlaneView& x, const StripLayout& layout, const StripTask& task, std::int64_t first_row,
                        std::int64_t rows, scalar_t* scratch) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const PackedColumns columns{layout, kWidth};
  const std::int64_t images = task.images;
  PackedPart part{larger_of(first_row, 0), smaller_of(first_row + rows, x.height), larger_of(layout.first_column, 0),
                  smaller_of(layout.first_column + layout.columns, x.width)};
  if (part.row_end < part.row_begin) part.row_end = part.row_begin;
  if (part.column_end < part.column_begin) part.column_end = part.column_begin;
  clear_borders(x, layout, first_row, rows, part, scratch);
  if (part.row_end == part.row_begin || part.column_end == part.column_begin) return;
  const scalar_t* source = static_cast<const scalar_t*>(x.data) + task.first_image * x.image_stride;
  scalar_t* to = scratch + (part.row_begin - first_row) * layout.row_pitch;
  const bool dense_rows = x.column_stride == 1 && x.row_stride == x.width;
  if (images == kWidth && dense_rows && (part.row_end - part.row_begin) * x.width >= kWidth) {
    for (std::int64_t channel = 0; channel < x.channels; ++channel) {
      pack_dense_rows(source + channel * x.channel_stride, x.image_stride, x.channel_stride, part, columns, x.width,
                      to + channel * layout.channel_pitch, layout.row_pitch);
    }
  } else if (images == kWidth && x.channel_stride == 1 && x.channels >= kWidth) {
    pack_dense_channels(source, x, part, columns, to);
  } else {
    pack_any(source, x, images, part, columns, to);
  }
}

// ---- results: [positions][lanes] of one channel -> `images` images
// A run of positions that follow one another in memory.
template <class scalar_t>
static void unpack_run(const scalar_t* acc, std::int64_t positions, scalar_t* to, std::int64_t image_stride,
                       std::int64_t images, bool stream) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  constexpr std::int64_t kBytes = kWidth * static_cast<std::int64_t>(sizeof(scalar_t));
  std::int64_t j = 0;
  if (images == kWidth) {
    const std::int64_t misaligned =
        (reinterpret_cast<std::intptr_t>(to) | image_stride * static_cast<std::int64_t>(sizeof(scalar_t))) % kBytes;
    for (; j + kWidth <= positions; j += kWidth) {
      if (stream && misaligned == 0) {
        transpose<scalar_t, true>(acc + j * kWidth, kWidth, to + j, image_stride);
      } else {
        transpose<scalar_t, false>(acc + j * kWidth, kWidth, to + j, image_stride);
      }
    }
    if (j == positions) return;
    alignas(64) scalar_t block[kWidth * kWidth];
    transpose<scalar_t, false>(acc + j * kWidth, kWidth, block, kWidth);  // acc has room for whole registers
    for (int i = 0; i < kWidth; ++i) {
      memcpy(to + i * image_stride + j, block + i * kWidth, static_cast<std::size_t>(positions - j) * sizeof(scalar_t));
    }
    return;
  }
  for (std::int64_t i = 0; i < images; ++i) {
    for (std::int64_t p = 0; p < positions; ++p) to[i * image_stride + p] = acc[p * kWidth + i];
  }
}

// [channels][positions][lanes], all images there -> one position of `channels`, which follow one another in memory.
template <class scalar_t>
static void unpack_channels(const scalar_t* acc, std::int64_t acc_pitch, std::int64_t channels, scalar_t* to,
                            std::int64_t image_stride) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  std::int64_t channel = 0;
  for (; channel + kWidth <= channels; channel += kWidth) {
    transpose<scalar_t, false>(acc + channel * acc_pitch, acc_pitch, to + channel, image_stride);
  }
  for (; channel < channels; ++channel) {
    for (int i = 0; i < kWidth; ++i) to[i * image_stride + channel] = acc[channel * acc_pitch + i];
  }
}

}  // namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY
