// SPDX-License-Identifier: Apache-2.0
// Vectors of float32, float64 and bfloat16 storage for the kernels of csrc/hvp: whole registers and the part of one
// that a row's end fills. Included by cpu_<isa>.cpp only.
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "common/simd.h"

namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY {

using namespace curvlab::CURVLAB_CPU_CAPABILITY;

typedef std::uint32_t FullUInt32Lanes __attribute__((vector_size(kLanes * 8)));
typedef std::uint16_t FullUInt16Lanes __attribute__((vector_size(kLanes * 4)));

template <class scalar_t>
struct Vectors {  // float, bfloat16
  using Lanes = FullFloatLanes;
  using acc_t = float;
  static constexpr int kWidth = 2 * kLanes;
};
template <>
struct Vectors<double> {
  using Lanes = DoubleLanes;
  using acc_t = double;
  static constexpr int kWidth = kLanes;
};

CURVLAB_INLINE FullFloatLanes load(const float* x) { return load_lanes<FullFloatLanes>(x); }
CURVLAB_INLINE DoubleLanes load(const double* x) { return load_lanes<DoubleLanes>(x); }
CURVLAB_INLINE FullFloatLanes widen(FullUInt16Lanes bits) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  return reinterpret_cast<FullFloatLanes>(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)), 16));
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
  return reinterpret_cast<FullFloatLanes>(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)), 16));
#else
  return reinterpret_cast<FullFloatLanes>(__builtin_convertvector(bits, FullUInt32Lanes) << 16);
#endif
}
CURVLAB_INLINE FullFloatLanes load(const BFloat16Bits* x) { return widen(load_lanes<FullUInt16Lanes>(x)); }

// Lane by lane bfloat16_from_float of common/elements.h.
CURVLAB_INLINE FullUInt16Lanes narrow(FullFloatLanes lanes) {
  const FullUInt32Lanes bits = reinterpret_cast<FullUInt32Lanes>(lanes);
  const FullUInt32Lanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const FullUInt32Lanes nan = reinterpret_cast<FullUInt32Lanes>(lanes != lanes);
  const FullUInt32Lanes result = (rounded & ~nan) | (((bits >> 16) | 0x40u) & nan);
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  return reinterpret_cast<FullUInt16Lanes>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(result)));
#else
  return __builtin_convertvector(result, FullUInt16Lanes);
#endif
}

CURVLAB_INLINE void store(float* out, FullFloatLanes lanes) { memcpy(out, &lanes, sizeof lanes); }
CURVLAB_INLINE void store(double* out, DoubleLanes lanes) { memcpy(out, &lanes, sizeof lanes); }
CURVLAB_INLINE void store(BFloat16Bits* out, FullFloatLanes lanes) {
  const FullUInt16Lanes bits = narrow(lanes);
  memcpy(out, &bits, sizeof bits);
}

// The first n lanes; the others are 0. The processor's masked forms: through memory, a row of 130 floats took as long
// for its last two as for the others.
CURVLAB_INLINE FullFloatLanes load_first(const float* x, int n) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), x);
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_maskload_ps(x, mask);
#else
  FullFloatLanes lanes{};
  memcpy(&lanes, x, static_cast<unsigned>(n) * sizeof(float));
  return lanes;
#endif
}

CURVLAB_INLINE DoubleLanes load_first(const double* x, int n) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), x);
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
  const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  return _mm256_maskload_pd(x, mask);
#else
  DoubleLanes lanes{};
  memcpy(&lanes, x, static_cast<unsigned>(n) * sizeof(double));
  return lanes;
#endif
}

CURVLAB_INLINE FullFloatLanes load_first(const BFloat16Bits* x, int n) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), x);
  return widen(reinterpret_cast<FullUInt16Lanes>(bits));
#else
  FullUInt16Lanes bits{};
  memcpy(&bits, x, static_cast<unsigned>(n) * sizeof(BFloat16Bits));
  return widen(bits);
#endif
}

CURVLAB_INLINE void store_first(float* out, FullFloatLanes lanes, int n) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1u << n) - 1), lanes);
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  _mm256_maskstore_ps(out, mask, lanes);
#else
  memcpy(out, &lanes, static_cast<unsigned>(n) * sizeof(float));
#endif
}

CURVLAB_INLINE void store_first(double* out, DoubleLanes lanes, int n) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  _mm512_mask_storeu_pd(out, static_cast<__mmask8>((1u << n) - 1), lanes);
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
  const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  _mm256_maskstore_pd(out, mask, lanes);
#else
  memcpy(out, &lanes, static_cast<unsigned>(n) * sizeof(double));
#endif
}

CURVLAB_INLINE void store_first(BFloat16Bits* out, FullFloatLanes lanes, int n) {
  const FullUInt16Lanes bits = narrow(lanes);
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  _mm256_mask_storeu_epi16(out, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m256i>(bits));
#else
  memcpy(out, &bits, static_cast<unsigned>(n) * sizeof(BFloat16Bits));
#endif
}

// A whole register, or its first n lanes.
template <bool whole, class scalar_t>
CURVLAB_INLINE typename Vectors<scalar_t>::Lanes load_some(const scalar_t* x, int n) {
  if constexpr (whole) return load(x);
  return load_first(x, n);
}

template <bool whole, class scalar_t>
CURVLAB_INLINE void store_some(scalar_t* out, typename Vectors<scalar_t>::Lanes lanes, int n) {
  if constexpr (whole) return store(out, lanes);
  return store_first(out, lanes, n);
}

// y where the byte is not 0, else 0.
template <bool whole>
CURVLAB_INLINE FullFloatLanes select(FullFloatLanes y, const std::uint8_t* mask, int n) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  const __m128i bytes =
      whole ? load_lanes<__m128i>(mask) : _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), mask);
  return _mm512_maskz_mov_ps(_mm_test_epi8_mask(bytes, bytes), y);
#else
  typedef std::uint8_t Bytes __attribute__((vector_size(2 * kLanes)));
  Bytes bytes{};
  if constexpr (whole) {
    bytes = load_lanes<Bytes>(mask);
  } else {
    memcpy(&bytes, mask, static_cast<unsigned>(n));
  }
#if defined(CURVLAB_CPU_CAPABILITY_AVX2)
  long long packed;
  memcpy(&packed, &bytes, sizeof packed);
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(packed));
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(wide, _mm256_setzero_si256())), y);
#else
  const FullInt32Lanes keep = __builtin_convertvector(bytes, FullInt32Lanes) != 0;
  return reinterpret_cast<FullFloatLanes>(reinterpret_cast<FullInt32Lanes>(y) & keep);
#endif
#endif
}

template <bool whole>
CURVLAB_INLINE DoubleLanes select(DoubleLanes y, const std::uint8_t* mask, int n) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  long long packed = 0;
  if constexpr (whole) {
    memcpy(&packed, mask, sizeof packed);
  } else {
    memcpy(&packed, mask, static_cast<unsigned>(n));
  }
  const __m128i bytes = _mm_cvtsi64_si128(packed);
  return _mm512_maskz_mov_pd(static_cast<__mmask8>(_mm_test_epi8_mask(bytes, bytes)), y);
#else
  Int64Lanes keep{};
  for (int lane = 0; lane < (whole ? kLanes : n); ++lane) keep[lane] = mask[lane] != 0 ? -1 : 0;
  return reinterpret_cast<DoubleLanes>(reinterpret_cast<Int64Lanes>(y) & keep);
#endif
}

}  // namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY
