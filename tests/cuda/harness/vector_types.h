// SPDX-License-Identifier: Apache-2.0
// Built-in vector types with CUDA's sizes and alignments (UBSan then sees a misaligned float4), and the 16-bit floats.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

#define SIMT_VECTOR_TYPES(T, name, align2, align4)                   \
  struct name##1 { T x; };                                           \
  struct alignas(align2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align4) name##4 { T x, y, z, w; };                  \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMT_VECTOR_TYPES(signed char, char, 2, 4)
SIMT_VECTOR_TYPES(unsigned char, uchar, 2, 4)
SIMT_VECTOR_TYPES(short, short, 4, 8)
SIMT_VECTOR_TYPES(unsigned short, ushort, 4, 8)
SIMT_VECTOR_TYPES(int, int, 8, 16)
SIMT_VECTOR_TYPES(unsigned, uint, 8, 16)
SIMT_VECTOR_TYPES(float, float, 8, 16)
SIMT_VECTOR_TYPES(long long, longlong, 16, 16)
SIMT_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
SIMT_VECTOR_TYPES(double, double, 16, 16)
#undef SIMT_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr explicit operator uint3() const { return {x, y, z}; }
};

// ---- bfloat16: the upper half of a float, rounded to nearest even ---------------------------------------------------
struct __nv_bfloat16 {
  uint16_t bits = 0;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fff) : uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

// ---- IEEE binary16 --------------------------------------------------------------------------------------------------
struct __half {
  uint16_t bits = 0;
  __half() = default;
  __half(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      bits = 0x7fff;
    } else if (magnitude >= 0x47800000u) {  // 65536 and more; 65520..65535 round up to infinity below
      bits = uint16_t(sign | 0x7c00u);
    } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded bits at the end
      const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
      bits = uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
    } else {
      bits = uint16_t(sign | (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13);
    }
  }
  operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;  // also right for subnormals
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
};
static_assert(sizeof(__half) == 2 && sizeof(__nv_bfloat16) == 2);

using half = __half;
using nv_bfloat16 = __nv_bfloat16;
inline float __half2float(__half v) { return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __half __float2half(float v) { return {v}; }
inline __half __float2half_rn(float v) { return {v}; }
inline __nv_bfloat16 __float2bfloat16(float v) { return {v}; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {v}; }
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
