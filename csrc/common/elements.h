// SPDX-License-Identifier: Apache-2.0
// The element types that kernels read, and their exact conversion to float.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/hd.h"

namespace curvlab {

// Storage of a tensor's elements; the numbers are part of the launchers' interface.
enum ElementType : std::int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// 16-bit floats travel as bits, so that no header of torch or CUDA is needed.
struct BFloat16Bits {
  std::uint16_t bits;
};
struct Float16Bits {
  std::uint16_t bits;
};

CURVLAB_HD int element_size(std::int32_t type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

CURVLAB_HD float float_from_bits(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

CURVLAB_HD std::uint32_t bits_from_float(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

CURVLAB_HD float bfloat16_to_float(std::uint32_t bits) { return float_from_bits(bits << 16); }

// To the nearest, ties to even; NaN stays NaN.
CURVLAB_HD BFloat16Bits bfloat16_from_float(float value) {
  const std::uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Exact for all 65536 patterns. Subnormals go through the integer mantissa (m * 2^-24), not through a float subnormal,
// so that a flush-to-zero setting of the CPU cannot turn them into zeros.
CURVLAB_HD float float16_to_float(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  // One instruction where the integer route takes 15, with a branch that diverges: float16 would be bound by issue.
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
  return value;
#else
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  const std::uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(static_cast<std::int32_t>(mantissa)) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const std::uint32_t wide = exponent == 31 ? 255u : exponent + 112u;  // bias 127 - 15
  return float_from_bits(sign | (wide << 23) | (mantissa << 13));
#endif
}

// The narrowest type that holds an element exactly: float, or double for float64.
CURVLAB_HD float load_element(float value) { return value; }
CURVLAB_HD double load_element(double value) { return value; }
CURVLAB_HD float load_element(BFloat16Bits value) { return bfloat16_to_float(value.bits); }
CURVLAB_HD float load_element(Float16Bits value) { return float16_to_float(value.bits); }

}  // namespace curvlab
