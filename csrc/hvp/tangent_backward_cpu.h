// SPDX-License-Identifier: Apache-2.0
// The vectorized CPU kernel of tangent_backward: rows of one direction. Included by cpu_<isa>.cpp only.
#pragma once

#include "hvp/tangent_forward_cpu.h"

namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY {

template <class scalar_t>
struct BackwardRows {
  using acc_t = typename Vectors<scalar_t>::acc_t;
  const scalar_t *g, *g2, *pre, *t, *factor, *second, *centered, *delta;
  const std::uint8_t* mask;
  scalar_t *gy, *gt;
  bool sum_bias, sum_gain;
  Repeated<acc_t> scale, inv_std, gain;
  acc_t bias_sum[kBlock], gain_sum[kBlock];
};

template <int registers, bool whole, class scalar_t>
CURVLAB_INLINE void backward_step(BackwardRows<scalar_t>& rows, std::int64_t i, std::int64_t column, std::int64_t j,
                                  int n) {
  using V = Vectors<scalar_t>;
  typename V::Lanes y[registers];
  const std::int64_t c = column + j;
  const auto each = [&](auto body) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) body(r, static_cast<std::int64_t>(r) * V::kWidth);
  };
  each([&](int r, std::int64_t s) { y[r] = load_some<whole>(rows.g + i + s, n); });
  if (rows.g2) each([&](int r, std::int64_t s) { y[r] += load_some<whole>(rows.g2 + i + s, n); });
  if (rows.mask) {
    each([&](int r, std::int64_t s) { y[r] = select<whole>(y[r], rows.mask + i + s, n); });
  } else if (rows.factor) {
    each([&](int r, std::int64_t s) { y[r] *= load_some<whole>(rows.factor + i + s, n); });
  }
  if (rows.second) {
    each([&](int r, std::int64_t s) {
      y[r] += load_some<whole>(rows.second + i + s, n) * load_some<whole>(rows.pre + i + s, n);
    });
  }
  if (rows.gy) each([&](int r, std::int64_t s) { store_some<whole>(rows.gy + i + s, y[r], n); });
  if (rows.sum_bias) each([&](int r, std::int64_t s) { add_to(rows.bias_sum + j + s, y[r]); });
  if (rows.sum_gain && rows.centered) {
    each([&](int r, std::int64_t s) {
      add_to(rows.gain_sum + j + s, y[r] * load_some<whole>(rows.centered + i + s, n));
    });
  }
  if (rows.sum_gain && rows.t) {
    each([&](int r, std::int64_t s) {
      const auto moved = load_some<whole>(rows.delta + i + s, n) * load_some<whole>(rows.t + i + s, n);
      add_to(rows.gain_sum + j + s, moved * load_some<whole>(rows.inv_std.values + c + s, n));
    });
  }
  if (!rows.gt) return;
  if (rows.scale.values) each([&](int r, std::int64_t s) { y[r] *= load_some<whole>(rows.scale.values + c + s, n); });
  if (rows.gain.values) {
    each([&](int r, std::int64_t s) {
      y[r] += load_some<whole>(rows.gain.values + c + s, n) * load_some<whole>(rows.delta + i + s, n);
    });
  }
  each([&](int r, std::int64_t s) { store_some<whole>(rows.gt + i + s, y[r], n); });
}

template <class scalar_t>
CURVLAB_INLINE void point_to(BackwardRows<scalar_t>& rows, const BackwardArguments& arguments, std::int64_t k,
                             std::int64_t begin) {
  const std::int64_t shared = begin * arguments.shape.channels, own = k * arguments.shape.plane() + shared;
  rows.g = offset<scalar_t>(arguments.g, own);
  rows.g2 = offset<scalar_t>(arguments.g2, own);
  rows.pre = offset<scalar_t>(arguments.pre, own);
  rows.t = offset<scalar_t>(arguments.t, own);
  rows.factor = arguments.shape.first_is_mask ? nullptr : offset<scalar_t>(arguments.first, shared);
  rows.mask = arguments.shape.first_is_mask ? offset<std::uint8_t>(arguments.first, shared) : nullptr;
  rows.second = offset<scalar_t>(arguments.second, shared);
  rows.centered = offset<scalar_t>(arguments.centered, shared);
  rows.delta = offset<scalar_t>(arguments.delta, shared);
  rows.gy = offset<scalar_t>(arguments.gy, own);
  rows.gt = offset<scalar_t>(arguments.gt, own);
}

// Rows [begin, end) of direction k; adds the sums over them to bias_sum[channels] and gain_sum[channels], where given.
template <class scalar_t>
static void backward_rows(const BackwardArguments& arguments, std::int64_t k, std::int64_t begin, std::int64_t end,
                          double* bias_sum, double* gain_sum) {
  using acc_t = typename Vectors<scalar_t>::acc_t;
  const std::int64_t channels = arguments.shape.channels, elements = (end - begin) * channels;
  const bool flat = !arguments.scale && !arguments.gain.data && !bias_sum && !gain_sum;
  const std::int64_t joined = flat ? 1 : period_rows<scalar_t>(channels), period = flat ? elements : joined * channels;
  BackwardRows<scalar_t> rows;
  point_to(rows, arguments, k, begin);
  rows.sum_bias = bias_sum != nullptr;
  rows.sum_gain = gain_sum != nullptr;
  fill<acc_t>(rows.scale, arguments.scale, channels, joined);
  fill<acc_t>(rows.inv_std, arguments.inv_std, channels, joined);
  fill<acc_t>(rows.gain, offset<acc_t>(arguments.gain.data, k * arguments.gain.stride), channels, joined);
  const unsigned long sums = static_cast<unsigned long>(period < kBlock ? period : kBlock) * sizeof(acc_t);
  if (bias_sum) memset(rows.bias_sum, 0, sums);
  if (gain_sum) memset(rows.gain_sum, 0, sums);
  walk(
      elements, period,
      [&](std::int64_t first, std::int64_t column, std::int64_t n) __attribute__((always_inline)) {
        for_registers<Vectors<scalar_t>::kWidth>(
            n, [&]<int registers, bool whole>(std::int64_t j, int lanes) __attribute__((always_inline)) {
              backward_step<registers, whole>(rows, first + j, column, j, lanes);
            });
      },
      [&](std::int64_t column, std::int64_t width) {
        if (bias_sum) {
          fold(rows.bias_sum, column, width, channels, bias_sum);
          memset(rows.bias_sum, 0, sums);
        }
        if (gain_sum) {
          fold(rows.gain_sum, column, width, channels, gain_sum);
          memset(rows.gain_sum, 0, sums);
        }
      });
}

}  // namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY
