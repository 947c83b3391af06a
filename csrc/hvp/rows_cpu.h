// SPDX-License-Identifier: Apache-2.0
// How the CPU kernels of csrc/hvp walk over [rows, channels] with arguments per channel: several rows make a period, so
// that rows of 10 or 16 channels fill registers as well as long ones. Included by cpu_<isa>.cpp only.
#pragma once

#include <cstdint>

#include "hvp/vectors_cpu.h"

namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY {

constexpr int kUnroll = 4;             // registers a step
constexpr std::int64_t kBlock = 2048;  // columns at a time: the running sums of a block stay in the L1 cache
constexpr std::int64_t kNarrow = 128;  // rows up to so many channels are joined to periods
constexpr std::int64_t kLeastPeriod = 256;

CURVLAB_INLINE std::int64_t greatest_common_divisor(std::int64_t a, std::int64_t b) {
  while (b != 0) {
    const std::int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// Rows that make a period: whole registers and at least kLeastPeriod elements (at most kBlock), or one wide row.
template <class scalar_t>
CURVLAB_INLINE std::int64_t period_rows(std::int64_t channels) {
  if (channels > kNarrow) return 1;
  const std::int64_t step = Vectors<scalar_t>::kWidth / greatest_common_divisor(Vectors<scalar_t>::kWidth, channels);
  const std::int64_t wanted = (kLeastPeriod + channels - 1) / channels;
  return (wanted + step - 1) / step * step;
}

// An argument per channel, repeated over a period where that is more than one row; null stays null.
template <class acc_t>
struct Repeated {
  const acc_t* values;
  acc_t copy[kBlock];
};

template <class acc_t>
CURVLAB_INLINE void fill(Repeated<acc_t>& to, const void* channel_values, std::int64_t channels, std::int64_t rows) {
  to.values = static_cast<const acc_t*>(channel_values);
  if (to.values == nullptr || rows == 1) return;
  for (std::int64_t row = 0; row < rows; ++row) {
    memcpy(to.copy + row * channels, to.values, static_cast<unsigned long>(channels) * sizeof(acc_t));
  }
  to.values = to.copy;
}

// Calls span(first element, column of the period, elements) so that a column's spans follow each other, and done(first
// column, columns) after a block of columns.
template <class Span, class Done>
CURVLAB_INLINE void walk(std::int64_t elements, std::int64_t period, Span span, Done done) {
  for (std::int64_t column = 0; column < period; column += kBlock) {
    const std::int64_t width = column + kBlock < period ? kBlock : period - column;
    for (std::int64_t first = column; first < elements; first += period) {
      span(first, column, first + width < elements ? width : elements - first);
    }
    done(column, width);
  }
}

// Calls step<registers, whole>(offset, elements) over n elements.
template <int width, class Step>
CURVLAB_INLINE void for_registers(std::int64_t n, Step step) {
  std::int64_t i = 0;
  for (; i + kUnroll * width <= n; i += kUnroll * width) step.template operator()<kUnroll, true>(i, width);
  for (; i + width <= n; i += width) step.template operator()<1, true>(i, width);
  if (i < n) step.template operator()<1, false>(i, static_cast<int>(n - i));
}

// Adds the sums of a block's columns to those of their channels, in order.
template <class acc_t>
CURVLAB_INLINE void fold(const acc_t* sums, std::int64_t column, std::int64_t width, std::int64_t channels,
                         double* total) {
  std::int64_t channel = column % channels;
  for (std::int64_t i = 0; i < width; ++i) {
    total[channel] += static_cast<double>(sums[i]);
    if (++channel == channels) channel = 0;
  }
}

template <class acc_t>
CURVLAB_INLINE void add_to(acc_t* sums, typename Vectors<acc_t>::Lanes lanes) {
  store(sums, load(sums) + lanes);
}

}  // namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY
