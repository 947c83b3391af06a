// SPDX-License-Identifier: Apache-2.0
// The vectorized CPU kernel of tangent_forward: rows of one direction. Included by cpu_<isa>.cpp only.
#pragma once

#include "hvp/rows_cpu.h"
#include "hvp/tangent.h"

namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY {

// Pointers to the first element of the rows, null where a term is absent. Tests of them stand in the innermost loop:
// they are foreseen, and shared by kUnroll registers.
template <class scalar_t>
struct ForwardRows {
  using acc_t = typename Vectors<scalar_t>::acc_t;
  const scalar_t *a, *b, *residual, *centered, *factor, *delta;
  const std::uint8_t* mask;
  scalar_t *out, *pre;
  Repeated<acc_t> bias, scale, gain;
  acc_t dot[kBlock];
};

template <int registers, bool whole, class scalar_t>
CURVLAB_INLINE void forward_step(ForwardRows<scalar_t>& rows, std::int64_t i, std::int64_t column, std::int64_t j,
                                 int n) {
  using V = Vectors<scalar_t>;
  typename V::Lanes y[registers];
  const auto each = [&](auto body) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) body(r, static_cast<std::int64_t>(r) * V::kWidth);
  };
  each([&](int r, std::int64_t s) { y[r] = load_some<whole>(rows.a + i + s, n); });
  if (rows.b) each([&](int r, std::int64_t s) { y[r] += load_some<whole>(rows.b + i + s, n); });
  if (rows.delta) {
    each([&](int r, std::int64_t s) { add_to(rows.dot + j + s, load_some<whole>(rows.delta + i + s, n) * y[r]); });
  }
  const std::int64_t c = column + j;
  if (rows.scale.values) each([&](int r, std::int64_t s) { y[r] *= load_some<whole>(rows.scale.values + c + s, n); });
  if (rows.bias.values) each([&](int r, std::int64_t s) { y[r] += load_some<whole>(rows.bias.values + c + s, n); });
  if (rows.gain.values) {
    each([&](int r, std::int64_t s) {
      y[r] += load_some<whole>(rows.gain.values + c + s, n) * load_some<whole>(rows.centered + i + s, n);
    });
  }
  if (rows.residual) each([&](int r, std::int64_t s) { y[r] += load_some<whole>(rows.residual + i + s, n); });
  if (rows.pre) each([&](int r, std::int64_t s) { store_some<whole>(rows.pre + i + s, y[r], n); });
  if (rows.mask) {
    each([&](int r, std::int64_t s) { y[r] = select<whole>(y[r], rows.mask + i + s, n); });
  } else if (rows.factor) {
    each([&](int r, std::int64_t s) { y[r] *= load_some<whole>(rows.factor + i + s, n); });
  }
  each([&](int r, std::int64_t s) { store_some<whole>(rows.out + i + s, y[r], n); });
}

template <class scalar_t>
CURVLAB_INLINE const scalar_t* offset(const void* data, std::int64_t elements) {
  return data == nullptr ? nullptr : static_cast<const scalar_t*>(data) + elements;
}

template <class scalar_t>
CURVLAB_INLINE scalar_t* offset(void* data, std::int64_t elements) {
  return data == nullptr ? nullptr : static_cast<scalar_t*>(data) + elements;
}

// Rows [begin, end) of direction k; adds sum_r delta t to dot[channels], if that is given.
template <class scalar_t>
static void forward_rows(const ForwardArguments& arguments, std::int64_t k, std::int64_t begin, std::int64_t end,
                         double* dot) {
  using acc_t = typename Vectors<scalar_t>::acc_t;
  const std::int64_t channels = arguments.shape.channels, elements = (end - begin) * channels;
  const std::int64_t shared = begin * channels, own = k * arguments.shape.plane() + shared;
  const bool flat = !arguments.scale && !arguments.bias.data && !arguments.gain.data && !dot;
  const std::int64_t joined = flat ? 1 : period_rows<scalar_t>(channels), period = flat ? elements : joined * channels;
  ForwardRows<scalar_t> rows;
  rows.a = offset<scalar_t>(arguments.a, own);
  rows.b = offset<scalar_t>(arguments.b, own);
  rows.residual = offset<scalar_t>(arguments.residual, own);
  rows.centered = offset<scalar_t>(arguments.centered, shared);
  rows.delta = dot ? offset<scalar_t>(arguments.delta, shared) : nullptr;
  rows.factor = arguments.shape.first_is_mask ? nullptr : offset<scalar_t>(arguments.first, shared);
  rows.mask = arguments.shape.first_is_mask ? offset<std::uint8_t>(arguments.first, shared) : nullptr;
  rows.out = offset<scalar_t>(arguments.out, own);
  rows.pre = offset<scalar_t>(arguments.pre, own);
  fill<acc_t>(rows.scale, arguments.scale, channels, joined);
  fill<acc_t>(rows.bias, offset<acc_t>(arguments.bias.data, k * arguments.bias.stride), channels, joined);
  fill<acc_t>(rows.gain, offset<acc_t>(arguments.gain.data, k * arguments.gain.stride), channels, joined);
  const unsigned long sums = static_cast<unsigned long>(period < kBlock ? period : kBlock) * sizeof(acc_t);
  if (dot) memset(rows.dot, 0, sums);
  walk(
      elements, period,
      [&](std::int64_t first, std::int64_t column, std::int64_t n) __attribute__((always_inline)) {
        for_registers<Vectors<scalar_t>::kWidth>(
            n, [&]<int registers, bool whole>(std::int64_t j, int lanes) __attribute__((always_inline)) {
              forward_step<registers, whole>(rows, first + j, column, j, lanes);
            });
      },
      [&](std::int64_t column, std::int64_t width) {
        if (dot == nullptr) return;
        fold(rows.dot, column, width, channels, dot);
        memset(rows.dot, 0, sums);
      });
}

}  // namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY
