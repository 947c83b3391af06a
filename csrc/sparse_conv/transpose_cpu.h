// SPDX-License-Identifier: Apache-2.0
// Square transposes of a register's width: lanes are images inside, and apart outside. Included by cpu_<isa>.cpp only.
#pragma once

#include <cstdint>

#include "sparse_conv/tiles_cpu.h"

namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY {

#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
template <bool stream>
CURVLAB_INLINE void store_floats(float* to, __m512 lanes) {
  if constexpr (stream) {
    _mm512_stream_ps(to, lanes);
  } else {
    _mm512_storeu_ps(to, lanes);
  }
}

// r[4 g + c] = four registers r[4 g + 0..3], transposed within each quarter: its quarter q holds lane 4 q + c of them.
CURVLAB_INLINE void transpose_quarters(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
}

// Rows[q] = quarter q of each of the four.
CURVLAB_INLINE void regroup_quarters(__m512 a, __m512 b, __m512 c, __m512 d, __m512 (&rows)[4]) {
  const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x88), ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd);
  const __m512 cd = _mm512_shuffle_f32x4(c, d, 0x88), cd_odd = _mm512_shuffle_f32x4(c, d, 0xdd);
  rows[0] = _mm512_shuffle_f32x4(ab, cd, 0x88);
  rows[1] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
  rows[2] = _mm512_shuffle_f32x4(ab, cd, 0xdd);
  rows[3] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
}

template <bool stream, class From>
CURVLAB_INLINE void transpose_floats(const From& from, float* to, std::int64_t to_pitch) {
  __m512 r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from(i));
  transpose_quarters(r);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512 rows[4];
    regroup_quarters(r[c], r[4 + c], r[8 + c], r[12 + c], rows);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) store_floats<stream>(to + (4 * q + c) * to_pitch, rows[q]);
  }
}
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
template <bool stream, class From>
CURVLAB_INLINE void transpose_floats(const From& from, float* to, std::int64_t to_pitch) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from(i));
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 a = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20), b = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    if constexpr (stream) {
      _mm256_stream_ps(to + i * to_pitch, a);
      _mm256_stream_ps(to + (i + 4) * to_pitch, b);
    } else {
      _mm256_storeu_ps(to + i * to_pitch, a);
      _mm256_storeu_ps(to + (i + 4) * to_pitch, b);
    }
  }
}
#endif

// to[j to_pitch + i] = from(i)[j], i, j < kWidth. stream: past the caches, `to` rows aligned to a register.
template <class scalar_t, bool stream, class From>
CURVLAB_INLINE void transpose_rows(const From& from, scalar_t* to, std::int64_t to_pitch) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512) || defined(CURVLAB_CPU_CAPABILITY_AVX2)
  if constexpr (sizeof(scalar_t) == sizeof(float)) return transpose_floats<stream>(from, to, to_pitch);
#endif
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) to[j * to_pitch + i] = from(i)[j];
  }
}

// The same of rows that lie `from_pitch` apart.
template <class scalar_t, bool stream>
CURVLAB_INLINE void transpose(const scalar_t* from, std::int64_t from_pitch, scalar_t* to, std::int64_t to_pitch) {
  transpose_rows<scalar_t, stream>([=](int i) { return from + i * from_pitch; }, to, to_pitch);
}

// to[j kWidth + i] = from(i)[column + j], j < 4: four columns of as many rows as a register has lanes.
template <class scalar_t, class From>
CURVLAB_INLINE void transpose_four(const From& from, std::int64_t column, scalar_t* to) {
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  if constexpr (kWidth == 16) {
    __m512 r[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      r[k] = _mm512_castps128_ps512(_mm_loadu_ps(from(k) + column));
      r[k] = _mm512_insertf32x4(r[k], _mm_loadu_ps(from(4 + k) + column), 1);
      r[k] = _mm512_insertf32x4(r[k], _mm_loadu_ps(from(8 + k) + column), 2);
      r[k] = _mm512_insertf32x4(r[k], _mm_loadu_ps(from(12 + k) + column), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    _mm512_storeu_ps(to, _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)));
    _mm512_storeu_ps(to + 16, _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)));
    _mm512_storeu_ps(to + 32, _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)));
    _mm512_storeu_ps(to + 48, _mm512_castpd_ps(_mm512_unpackhi_pd(b, d)));
    return;
  }
#endif
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < 4; ++j) to[j * kWidth + i] = from(i)[column + j];
  }
}

}  // namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY
