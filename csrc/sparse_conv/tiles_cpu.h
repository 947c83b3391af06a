// SPDX-License-Identifier: Apache-2.0
// The inner loops: R x V vectors of results (or of the gradient) stay in registers over all entries of a segment, so an
// entry costs one broadcast and one aligned load per FMA. Two loads a cycle feed two FMAs: the window must be in L1.
// Included by cpu_<isa>.cpp only.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "sparse_conv/strip.h"

namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY {

using namespace curvlab::CURVLAB_CPU_CAPABILITY;

template <class scalar_t>
struct Vectors {
  typedef FullFloatLanes Lanes;
  static constexpr int kWidth = 2 * kLanes;
};
template <>
struct Vectors<double> {
  typedef DoubleLanes Lanes;
  static constexpr int kWidth = kLanes;
};

#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
constexpr int kTile = 16;   // of 32 registers
constexpr int kChains = 8;  // of the weight gradient, beside a tile
#else
constexpr int kTile = 8;  // of 16
constexpr int kChains = 4;
#endif
constexpr int kMaxTileRows = 4;

template <class scalar_t>
CURVLAB_INLINE typename Vectors<scalar_t>::Lanes load_vector(const scalar_t* x) {
  return load_lanes<typename Vectors<scalar_t>::Lanes>(x);
}

template <class scalar_t>
CURVLAB_INLINE void store_vector(scalar_t* x, typename Vectors<scalar_t>::Lanes lanes) {
  memcpy(x, &lanes, sizeof lanes);
}

// Keeps the address in one register, so that loads are one of it and a constant: g++ 12 else computes each address of a
// second row from two registers and another instruction (tiles of two rows took 5-9 % longer).
#if defined(__GNUC__)
#define CURVLAB_ONE_POINTER(pointer) asm("" : "+r"(pointer))
#else
#define CURVLAB_ONE_POINTER(pointer) (void)(pointer)
#endif

// acc[i] (+)= sum over the entries of value * x[offset + i]; without `accumulate` from `start`.
template <class scalar_t, int R, int V>
static __attribute__((noinline)) void correlate_tile(const scalar_t* __restrict x, std::int64_t row_pitch,
                                                     const std::int32_t* __restrict offsets,
                                                     const scalar_t* __restrict values, std::int64_t count,
                                                     bool accumulate, scalar_t start, scalar_t* __restrict acc) {
  typedef typename Vectors<scalar_t>::Lanes Lanes;
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  Lanes sums[R * V];
  if (accumulate) {
#pragma GCC unroll 32
    for (int i = 0; i < R * V; ++i) sums[i] = load_vector(acc + i * kWidth);
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < R * V; ++i) sums[i] = start - Lanes{};
  }
  for (std::int64_t k = 0; k < count; ++k) {
    const scalar_t* source = x + offsets[k];
    const Lanes value = values[k] - Lanes{};
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r, source += row_pitch) {
      CURVLAB_ONE_POINTER(source);
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) sums[r * V + v] += value * load_vector(source + v * kWidth);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < R * V; ++i) store_vector(acc + i * kWidth, sums[i]);
}

CURVLAB_INLINE float sum_vector(FullFloatLanes lanes) {
  float values[2 * kLanes];
  memcpy(values, &lanes, sizeof values);
  for (int width = kLanes; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  }
  return values[0];
}
CURVLAB_INLINE double sum_vector(DoubleLanes lanes) { return sum_lanes(lanes); }

// sums[i] += the sum of lanes[i]: four sums in one go where the processor can.
template <class Lanes, class scalar_t>
CURVLAB_INLINE void add_four_sums(const Lanes (&lanes)[4], scalar_t* sums) {
  for (int i = 0; i < 4; ++i) sums[i] += sum_vector(lanes[i]);
}
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
CURVLAB_INLINE void add_four_sums(const FullFloatLanes (&lanes)[4], float* sums) {
  const __m512 a = lanes[0], b = lanes[1], c = lanes[2], d = lanes[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  const __m128 total = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), total));
}
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
CURVLAB_INLINE void add_four_sums(const FullFloatLanes (&lanes)[4], float* sums) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(lanes[0], lanes[1]), _mm256_hadd_ps(lanes[2], lanes[3]));
  const __m128 total = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), total));
}
#endif

// sums[k] += <held, x[offset k]> over the tile, for `count` entries of the `Chains` that are computed: past the end the
// last entry is repeated.
template <int R, int V, int Chains, class scalar_t, class Lanes>
CURVLAB_INLINE void dot_entries(const scalar_t* __restrict x, std::int64_t row_pitch, const Lanes (&held)[R * V],
                                const std::int32_t* __restrict offsets, std::int64_t count, scalar_t* __restrict sums) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  const scalar_t* source[Chains];
#pragma GCC unroll 8
  for (int i = 0; i < Chains; ++i) source[i] = x + offsets[i < count ? i : count - 1];
  Lanes chains[Chains / 4][4] = {};
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
      for (int i = 0; i < Chains; ++i) chains[i / 4][i % 4] += held[r * V + v] * load_vector(source[i] + v * kWidth);
    }
    if (r + 1 == R) break;
#pragma GCC unroll 8
    for (int i = 0; i < Chains; ++i) {
      source[i] += row_pitch;
      CURVLAB_ONE_POINTER(source[i]);
    }
  }
#pragma GCC unroll 2
  for (int f = 0; f < Chains / 4; ++f) {
    if (4 * f + 4 <= count) {
      add_four_sums(chains[f], sums + 4 * f);
    } else {
      scalar_t rest[4] = {};
      add_four_sums(chains[f], rest);
      for (int i = 0; 4 * f + i < count; ++i) sums[4 * f + i] += rest[i];
    }
  }
}

// sums[k] += <grad, x[offset k]> over the tile. Eight entries at a time: as many independent chains as two
// multiply-adds a cycle of four cycles each keep busy (four chains took a fifth longer), one load each.
template <class scalar_t, int R, int V>
static __attribute__((noinline)) void dot_tile(const scalar_t* __restrict x, std::int64_t row_pitch,
                                               const scalar_t* __restrict grad, std::int64_t grad_pitch,
                                               const std::int32_t* __restrict offsets, std::int64_t count,
                                               scalar_t* __restrict sums) {
  typedef typename Vectors<scalar_t>::Lanes Lanes;
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  Lanes held[R * V];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) held[r * V + v] = load_vector(grad + r * grad_pitch + v * kWidth);
  }
  std::int64_t k = 0;
  for (; k + kChains <= count; k += kChains) {
    dot_entries<R, V, kChains>(x, row_pitch, held, offsets + k, kChains, sums + k);
  }
  for (; k < count; k += 4) {
    dot_entries<R, V, 4>(x, row_pitch, held, offsets + k, count - k < 4 ? count - k : 4, sums + k);
  }
}

// The functions by [rows - 1][columns - 1]; rows x columns is at most kTile.
#define CURVLAB_TILE_ROW(f, r)                                                               \
  {f < scalar_t, r, r * 1 <= kTile ? 1 : 1 >,   f < scalar_t, r, r * 2 <= kTile ? 2 : 1 >,   \
   f < scalar_t, r, r * 3 <= kTile ? 3 : 1 >,   f < scalar_t, r, r * 4 <= kTile ? 4 : 1 >,   \
   f < scalar_t, r, r * 5 <= kTile ? 5 : 1 >,   f < scalar_t, r, r * 6 <= kTile ? 6 : 1 >,   \
   f < scalar_t, r, r * 7 <= kTile ? 7 : 1 >,   f < scalar_t, r, r * 8 <= kTile ? 8 : 1 >,   \
   f < scalar_t, r, r * 9 <= kTile ? 9 : 1 >,   f < scalar_t, r, r * 10 <= kTile ? 10 : 1 >, \
   f < scalar_t, r, r * 11 <= kTile ? 11 : 1 >, f < scalar_t, r, r * 12 <= kTile ? 12 : 1 >, \
   f < scalar_t, r, r * 13 <= kTile ? 13 : 1 >, f < scalar_t, r, r * 14 <= kTile ? 14 : 1 >, \
   f < scalar_t, r, r * 15 <= kTile ? 15 : 1 >, f < scalar_t, r, r * 16 <= kTile ? 16 : 1 > }

template <class scalar_t>
struct TileTables {
  static constexpr decltype(&correlate_tile<scalar_t, 1, 1>) correlate[kMaxTileRows][16] = {
      CURVLAB_TILE_ROW(correlate_tile, 1), CURVLAB_TILE_ROW(correlate_tile, 2), CURVLAB_TILE_ROW(correlate_tile, 3),
      CURVLAB_TILE_ROW(correlate_tile, 4)};
  static constexpr decltype(&dot_tile<scalar_t, 1, 1>) dot[kMaxTileRows][16] = {
      CURVLAB_TILE_ROW(dot_tile, 1), CURVLAB_TILE_ROW(dot_tile, 2), CURVLAB_TILE_ROW(dot_tile, 3),
      CURVLAB_TILE_ROW(dot_tile, 4)};
};

}  // namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY
