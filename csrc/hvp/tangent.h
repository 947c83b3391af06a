// SPDX-License-Identifier: Apache-2.0
// tangent_forward and tangent_backward: what stands between two matrix products or convolutions, for K directions at
// once. Data are [K, R, C], channels innermost; factors that the directions share are [R, C]; arguments per channel are
// [C] or [K, C]. Absent terms are left out.
//   forward   t = a + b,  y = scale_c t + gain_kc centered_rc + bias_kc + residual,  out = first_rc y,  pre = y,
//             dot_kc = sum_r delta_rc t_krc
//   backward  gy = first_rc (g + g2) + second_rc pre,  gt = scale_c gy + gain_kc delta_rc,
//             bias_kc = sum_r gy,  gain_kc = sum_r (gy centered_rc + inv_std_c delta_rc t_krc) + inv_std_c dot_kc
// with first = phi'(z) and second = phi''(z) delta of an activation phi, and for batch normalization scale = gamma
// inv_std, centered = (z - mean) inv_std, delta = the loss' derivative by its output. A uint8 first selects.
// Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994).
#pragma once

#include <cstdint>

#include "common/elements.h"

namespace curvlab::hvp {

// Data of type `type`; arguments per channel and sums in acc_t: double for float64, else float.
struct Rows {
  std::int64_t directions, rows, channels;
  std::int32_t type;           // ElementType, not kFloat16
  std::int32_t first_is_mask;  // uint8 instead of the data's type

  CURVLAB_HD std::int64_t plane() const { return rows * channels; }
};

struct ChannelRows {  // [K, C]: rows of C numbers, `stride` apart
  const void* data;
  std::int64_t stride;
};

struct ForwardArguments {
  Rows shape;
  const void *a, *b, *residual;          // [K, R, C]
  const void *centered, *first, *delta;  // [R, C]
  const void* scale;                     // [C]
  ChannelRows bias, gain;
  void *out, *pre;  // [K, R, C]
};

struct BackwardArguments {
  Rows shape;
  const void *g, *g2, *pre, *t;                   // [K, R, C]
  const void *first, *second, *centered, *delta;  // [R, C]
  const void *scale, *inv_std;                    // [C]
  ChannelRows gain;
  void *gy, *gt;  // [K, R, C]
};

// Rows are summed in chunks, a chunk's in a fixed order of the kernel's own and the chunks' in order, so that sums have
// the same bits for any number of threads.
constexpr std::int64_t kChunkElements = 8192;
constexpr std::int64_t kChunkRows = 64;

CURVLAB_HD std::int64_t chunk_rows(std::int64_t channels) {
  const std::int64_t rows = kChunkElements / channels;
  return rows > kChunkRows ? rows : kChunkRows;
}

CURVLAB_HD std::int64_t chunk_count(const Rows& shape) {
  const std::int64_t rows = chunk_rows(shape.channels);
  return (shape.rows + rows - 1) / rows;
}

}  // namespace curvlab::hvp
