// SPDX-License-Identifier: Apache-2.0
// Square transposes of a register's width: lanes are images inside, and apart outside. Included by cpu_<isa>.cpp only.
#pragma once

#include <cstdint>

#include "sparse_conv/tiles_cpu.h"

namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY {

#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
template <bool stream>
CURVLAB_INLINE void transpose_floats(const float* from, std::int64_t from_pitch, float* to, std::int64_t to_pitch) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * from_pitch);
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
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if constexpr (stream) {
      _mm512_stream_ps(to + i * to_pitch, r[i]);
    } else {
      _mm512_storeu_ps(to + i * to_pitch, r[i]);
    }
  }
}
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
template <bool stream>
CURVLAB_INLINE void transpose_floats(const float* from, std::int64_t from_pitch, float* to, std::int64_t to_pitch) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_pitch);
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

// to[j to_pitch + i] = from[i from_pitch + j], i, j < kWidth. stream: past the caches, `to` rows aligned to a register.
template <class scalar_t, bool stream>
CURVLAB_INLINE void transpose(const scalar_t* from, std::int64_t from_pitch, scalar_t* to, std::int64_t to_pitch) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512) || defined(CURVLAB_CPU_CAPABILITY_AVX2)
  if constexpr (sizeof(scalar_t) == sizeof(float)) return transpose_floats<stream>(from, from_pitch, to, to_pitch);
#endif
  constexpr int kWidth = Vectors<scalar_t>::kWidth;
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) to[j * to_pitch + i] = from[i * from_pitch + j];
  }
}

}  // namespace curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY
