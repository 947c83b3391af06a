// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set that a cpu_<isa>.cpp is compiled for, as GCC vector extensions. Included by those
// files only. No template of the standard library may be instantiated there: its symbol would be weak, and the linker
// could pick the AVX-512 copy for everyone.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(CURVLAB_CPU_CAPABILITY_AVX2) || defined(CURVLAB_CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace curvlab {
namespace CURVLAB_CPU_CAPABILITY {

#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
constexpr int kLanes = 8;  // doubles in a register
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;  // SSE2, NEON
#endif

typedef double DoubleLanes __attribute__((vector_size(kLanes * 8)));
typedef float FloatLanes __attribute__((vector_size(kLanes * 4)));
typedef float FullFloatLanes __attribute__((vector_size(kLanes * 8)));  // a whole register of floats
typedef std::int64_t Int64Lanes __attribute__((vector_size(kLanes * 8)));
typedef std::int32_t Int32Lanes __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t FullInt32Lanes __attribute__((vector_size(kLanes * 8)));
typedef std::uint32_t UInt32Lanes __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t UInt16Lanes __attribute__((vector_size(kLanes * 2)));

#define CURVLAB_INLINE static inline __attribute__((always_inline))

template <class Lanes>
CURVLAB_INLINE Lanes load_lanes(const void* pointer) {  // any alignment
  Lanes lanes;
  memcpy(&lanes, pointer, sizeof lanes);
  return lanes;
}

// g++ 12 makes five instructions of __builtin_convertvector where the processor has one: a third of the speed.
CURVLAB_INLINE DoubleLanes widen_float(FloatLanes lanes) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  return _mm512_cvtps_pd(lanes);
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
  return _mm256_cvtps_pd(lanes);
#else
  return __builtin_convertvector(lanes, DoubleLanes);
#endif
}

CURVLAB_INLINE FloatLanes absolute(FloatLanes lanes) {
  return reinterpret_cast<FloatLanes>(reinterpret_cast<Int32Lanes>(lanes) & 0x7fffffff);
}

CURVLAB_INLINE FullFloatLanes absolute(FullFloatLanes lanes) {
  return reinterpret_cast<FullFloatLanes>(reinterpret_cast<FullInt32Lanes>(lanes) & 0x7fffffff);
}

CURVLAB_INLINE DoubleLanes absolute(DoubleLanes lanes) {
  return reinterpret_cast<DoubleLanes>(reinterpret_cast<Int64Lanes>(lanes) & INT64_C(0x7fffffffffffffff));
}

// The larger, lane by lane; `old` where a lane of `value` is NaN.
CURVLAB_INLINE FloatLanes larger(FloatLanes value, FloatLanes old) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  return _mm256_max_ps(value, old);
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
  return _mm_max_ps(value, old);
#else
  return value > old ? value : old;
#endif
}

CURVLAB_INLINE FullFloatLanes larger(FullFloatLanes value, FullFloatLanes old) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(value, old);
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(value, old);
#else
  return value > old ? value : old;
#endif
}

CURVLAB_INLINE DoubleLanes larger(DoubleLanes value, DoubleLanes old) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  return _mm512_max_pd(value, old);
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
  return _mm256_max_pd(value, old);
#else
  return value > old ? value : old;
#endif
}

CURVLAB_INLINE FloatLanes widen_bfloat16(UInt16Lanes bits) {
  return reinterpret_cast<FloatLanes>(__builtin_convertvector(bits, UInt32Lanes) << 16);
}

// Lane by lane the steps of float16_to_float in common/elements.h.
CURVLAB_INLINE FloatLanes widen_float16(UInt16Lanes bits) {
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#elif defined(CURVLAB_CPU_CAPABILITY_AVX2)
  return _mm_cvtph_ps(_mm_cvtsi64_si128(reinterpret_cast<long long>(bits)));
#else
  const UInt32Lanes half = __builtin_convertvector(bits, UInt32Lanes);
  const UInt32Lanes sign = (half & 0x8000u) << 16, exponent = half & 0x7c00u;
  const UInt32Lanes normal = ((half & 0x7fffu) << 13) + (112u << 23);  // bias 127 - 15
  const FloatLanes subnormal =
      __builtin_convertvector(reinterpret_cast<Int32Lanes>(half & 0x3ffu), FloatLanes) * 0x1p-24f;
  UInt32Lanes magnitude = exponent == 0x7c00u ? normal + (112u << 23) : normal;
  magnitude = exponent == 0u ? reinterpret_cast<UInt32Lanes>(subnormal) : magnitude;
  return reinterpret_cast<FloatLanes>(magnitude | sign);
#endif
}

// Pairwise, in a fixed order.
CURVLAB_INLINE double sum_lanes(DoubleLanes lanes) {
  double values[kLanes];
  memcpy(values, &lanes, sizeof values);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  }
  return values[0];
}

}  // namespace CURVLAB_CPU_CAPABILITY
}  // namespace curvlab
