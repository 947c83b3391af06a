// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of first_conv_forward and first_conv_weight: one image in one direction. Included by cpu_<isa>.cpp
// only. Outputs lie across the lanes of a register; a value of x goes to all of them.
#pragma once

#include "hvp/first_conv.h"
#include "hvp/vectors_cpu.h"

namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY {

constexpr std::int64_t kWide = Vectors<float>::kWidth;
typedef std::uint8_t ChoiceLanes __attribute__((vector_size(2 * kLanes)));

CURVLAB_INLINE ChoiceLanes load_choice(const std::uint8_t* choice, std::int64_t n) {
  if (n >= kWide) return load_lanes<ChoiceLanes>(choice);
  ChoiceLanes lanes{};
  memcpy(&lanes, choice, static_cast<unsigned long>(n));
  return lanes;
}

// y where the choice is `position`, else 0.
CURVLAB_INLINE FullFloatLanes where_chosen(ChoiceLanes choice, int position, FullFloatLanes y) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  const __mmask16 mask =
      _mm_cmpeq_epi8_mask(reinterpret_cast<__m128i>(choice), _mm_set1_epi8(static_cast<char>(position)));
  return _mm512_maskz_mov_ps(mask, y);
#else
  const auto equal = choice == static_cast<std::uint8_t>(position);
  const FullInt32Lanes mask = __builtin_convertvector(equal, FullInt32Lanes);
  return reinterpret_cast<FullFloatLanes>(reinterpret_cast<FullInt32Lanes>(y) & mask);
#endif
}

CURVLAB_INLINE FullFloatLanes load_row(const float* x, std::int64_t n) {
  return n >= kWide ? load(x) : load_first(x, static_cast<int>(n));
}

CURVLAB_INLINE void store_row(float* out, FullFloatLanes lanes, std::int64_t n) {
  if (n >= kWide) return store(out, lanes);
  store_first(out, lanes, static_cast<int>(n));
}

// Sums of `count` positions times `blocks` registers of outputs. w: packed [taps, lanes] from the first output on.
template <int count, int blocks>
CURVLAB_INLINE void convolve(const FirstConvArguments& conv, const float* const (&at)[count], const float* w,
                             const float* bias, std::int64_t o, FullFloatLanes (&sums)[count][blocks]) {
#pragma GCC unroll 8
  for (int b = 0; b < blocks; ++b) {
    const std::int64_t from = o + b * kWide;
    const FullFloatLanes start = bias != nullptr ? load_row(bias + from, conv.outputs - from) : FullFloatLanes{};
#pragma GCC unroll 8
    for (int p = 0; p < count; ++p) sums[p][b] = start;
  }
  const std::int64_t line = conv.width * conv.channels, segment = conv.segment();
  for (std::int64_t r = 0; r < conv.kernel_height; ++r) {
    for (std::int64_t t = r * line; t < r * line + segment; ++t, w += conv.lanes) {
      FullFloatLanes weights[blocks];
#pragma GCC unroll 8
      for (int b = 0; b < blocks; ++b) weights[b] = load(w + b * kWide);
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) {
        const float value = at[p][t];
#pragma GCC unroll 8
        for (int b = 0; b < blocks; ++b) sums[p][b] += value * weights[b];
      }
    }
  }
}

// The next `windows` windows of four positions, one after another in a row of windows.
template <int windows, int blocks>
CURVLAB_INLINE void pooled_windows(const FirstConvArguments& conv, const float* from, const std::uint8_t* choice,
                                   const float* w, const float* bias, std::int64_t o, float* out) {
  const std::int64_t down = conv.stride_height * conv.width * conv.channels, right = conv.stride_width * conv.channels;
  const float* at[4 * windows];
#pragma GCC unroll 8
  for (int p = 0; p < 4 * windows; ++p) at[p] = from + (p / 4 * 2 + p % 2) * right + (p / 2 % 2) * down;
  FullFloatLanes sums[4 * windows][blocks];
  convolve<4 * windows, blocks>(conv, at, w, bias, o, sums);
#pragma GCC unroll 8
  for (int q = 0; q < windows; ++q) {
#pragma GCC unroll 8
    for (int b = 0; b < blocks; ++b) {
      const std::int64_t first = o + b * kWide, live = conv.outputs - first;
      const ChoiceLanes chosen = load_choice(choice + q * conv.outputs + first, live);
      FullFloatLanes y = where_chosen(chosen, 0, sums[4 * q][b]);
#pragma GCC unroll 4
      for (int p = 1; p < 4; ++p) y += where_chosen(chosen, p, sums[4 * q + p][b]);
      store_row(out + q * conv.outputs + first, y, live);
    }
  }
}

template <int count, int blocks>
CURVLAB_INLINE void plain_positions(const FirstConvArguments& conv, const float* from, const float* w,
                                    const float* bias, std::int64_t o, float* out) {
  const float* at[count];
#pragma GCC unroll 8
  for (int p = 0; p < count; ++p) at[p] = from + p * conv.stride_width * conv.channels;
  FullFloatLanes sums[count][blocks];
  convolve<count, blocks>(conv, at, w, bias, o, sums);
#pragma GCC unroll 8
  for (int p = 0; p < count; ++p) {
#pragma GCC unroll 8
    for (int b = 0; b < blocks; ++b) {
      const std::int64_t first = o + b * kWide;
      store_row(out + p * conv.outputs + first, sums[p][b], conv.outputs - first);
    }
  }
}

template <int blocks>
static void forward_outputs(const FirstConvArguments& conv, const float* x, const std::uint8_t* choice, const float* w,
                            const float* bias, std::int64_t o, float* out) {
  const std::int64_t down = conv.stride_height * conv.width * conv.channels, right = conv.stride_width * conv.channels;
  if (choice != nullptr) {
    const std::int64_t columns = conv.columns / 2, step = conv.outputs;
    for (std::int64_t i = 0; i < conv.rows / 2; ++i, choice += columns * step, out += columns * step) {
      const float* line = x + 2 * i * down;
      std::int64_t j = 0;
      for (; j + 2 <= columns; j += 2) {
        pooled_windows<2, blocks>(conv, line + 2 * j * right, choice + j * step, w, bias, o, out + j * step);
      }
      if (j < columns) {
        pooled_windows<1, blocks>(conv, line + 2 * j * right, choice + j * step, w, bias, o, out + j * step);
      }
    }
    return;
  }
  for (std::int64_t i = 0; i < conv.rows; ++i, out += conv.columns * conv.outputs) {
    const float* line = x + i * down;
    std::int64_t j = 0;
    for (; j + 8 <= conv.columns; j += 8) {
      plain_positions<8, blocks>(conv, line + j * right, w, bias, o, out + j * conv.outputs);
    }
    for (; j < conv.columns; ++j) {
      plain_positions<1, blocks>(conv, line + j * right, w, bias, o, out + j * conv.outputs);
    }
  }
}

// packed: [taps, lanes] of one direction; choice, out: of one image.
static void first_conv_image(const FirstConvArguments& conv, std::int64_t n, const float* packed, const float* bias,
                             float* out) {
  const float* x = conv.x + n * conv.image();
  const std::uint8_t* choice = conv.choice == nullptr ? nullptr : conv.choice + n * conv.windows() * conv.outputs;
  std::int64_t o = 0;
  for (; o + kWide < conv.outputs; o += 2 * kWide) forward_outputs<2>(conv, x, choice, packed + o, bias, o, out);
  if (o < conv.outputs) forward_outputs<1>(conv, x, choice, packed + o, bias, o, out);
}

// `taps` derivatives in a row, for one register of outputs, over one image.
template <int taps>
static void weight_taps(const FirstConvArguments& conv, const float* x, const std::uint8_t* choice, const float* g,
                        std::int64_t live, double* sums) {
  const std::int64_t down = conv.stride_height * conv.width * conv.channels, right = conv.stride_width * conv.channels;
  FullFloatLanes total[taps] = {};
  const bool pooled = choice != nullptr;
  const std::int64_t rows = pooled ? conv.rows / 2 : conv.rows, columns = pooled ? conv.columns / 2 : conv.columns;
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* at = x + (pooled ? 2 * i : i) * down;
    for (std::int64_t j = 0; j < columns; ++j, g += conv.outputs) {
      const FullFloatLanes signal = load_row(g, live);
      if (!pooled) {
#pragma GCC unroll 12
        for (int t = 0; t < taps; ++t) total[t] += at[t] * signal;
        at += right;
        continue;
      }
      const ChoiceLanes chosen = load_choice(choice, live);
      choice += conv.outputs;
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const FullFloatLanes share = where_chosen(chosen, p, signal);
        const float* from = at + (p % 2) * right + (p / 2) * down;
        asm("" : "+r"(from));  // else g++ keeps 36 addresses in place of 4, most of them in memory
#pragma GCC unroll 12
        for (int t = 0; t < taps; ++t) total[t] += from[t] * share;
      }
      at += 2 * right;
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < taps; ++t) {  // stored whole: lanes taken by their number would keep all totals in memory
    float part[kWide];
    store(part, total[t]);
    for (std::int64_t lane = 0; lane < kWide; ++lane) sums[t * conv.lanes + lane] += static_cast<double>(part[lane]);
  }
}

using WeightTaps = void (*)(const FirstConvArguments&, const float*, const std::uint8_t*, const float*, std::int64_t,
                            double*);

// Adds one image's share to sums [taps, lanes]; g: of one image.
static void first_conv_weight_image(const FirstConvArguments& conv, std::int64_t n, const float* g, double* sums) {
  constexpr int kMost = 12;
  constexpr WeightTaps kernels[kMost] = {weight_taps<1>, weight_taps<2>,  weight_taps<3>,  weight_taps<4>,
                                         weight_taps<5>, weight_taps<6>,  weight_taps<7>,  weight_taps<8>,
                                         weight_taps<9>, weight_taps<10>, weight_taps<11>, weight_taps<12>};
  const float* x = conv.x + n * conv.image();
  const std::uint8_t* choice = conv.choice == nullptr ? nullptr : conv.choice + n * conv.windows() * conv.outputs;
  const std::int64_t segment = conv.segment();
  for (std::int64_t r = 0; r < conv.kernel_height; ++r) {
    for (std::int64_t t = 0; t < segment;) {
      const std::int64_t taps = segment - t < kMost ? segment - t : kMost;
      for (std::int64_t o = 0; o < conv.outputs; o += kWide) {
        kernels[taps - 1](conv, x + r * conv.width * conv.channels + t, choice == nullptr ? nullptr : choice + o, g + o,
                          conv.outputs - o, sums + (r * segment + t) * conv.lanes + o);
      }
      t += taps;
    }
  }
}

}  // namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY
