// SPDX-License-Identifier: Apache-2.0
// 16-byte loads and stores, and the elements in them.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "common/elements.h"

namespace curvlab {

constexpr int kLoadBytes = 16;

// What each element of a load is held in.
template <class scalar_t>
struct Held {
  using type = float;
};
template <>
struct Held<double> {
  using type = double;
};

template <class scalar_t>
constexpr int kPerLoad = kLoadBytes / static_cast<int>(sizeof(scalar_t));

__device__ __forceinline__ void unpack(const uint4& load, float (&values)[4], float) {
  values[0] = float_from_bits(load.x);
  values[1] = float_from_bits(load.y);
  values[2] = float_from_bits(load.z);
  values[3] = float_from_bits(load.w);
}

__device__ __forceinline__ double double_from_bits(unsigned low, unsigned high) {
  const std::uint64_t bits = static_cast<std::uint64_t>(high) << 32 | low;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

__device__ __forceinline__ void unpack(const uint4& load, double (&values)[2], double) {
  values[0] = double_from_bits(load.x, load.y);
  values[1] = double_from_bits(load.z, load.w);
}

template <class scalar_t>
__device__ __forceinline__ void unpack(const uint4& load, float (&values)[8], scalar_t) {
  const unsigned words[4] = {load.x, load.y, load.z, load.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = load_element(scalar_t{static_cast<std::uint16_t>(words[i] & 0xffffu)});
    values[2 * i + 1] = load_element(scalar_t{static_cast<std::uint16_t>(words[i] >> 16)});
  }
}

__device__ __forceinline__ uint4 pack(const float (&values)[4], float) {
  return {bits_from_float(values[0]), bits_from_float(values[1]), bits_from_float(values[2]),
          bits_from_float(values[3])};
}

__device__ __forceinline__ uint4 pack(const double (&values)[2], double) {
  std::uint64_t low, high;
  memcpy(&low, &values[0], sizeof low);
  memcpy(&high, &values[1], sizeof high);
  return {static_cast<unsigned>(low), static_cast<unsigned>(low >> 32), static_cast<unsigned>(high),
          static_cast<unsigned>(high >> 32)};
}

__device__ __forceinline__ uint4 pack(const float (&values)[8], BFloat16Bits) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = bfloat16_from_float(values[2 * i]).bits |
               static_cast<unsigned>(bfloat16_from_float(values[2 * i + 1]).bits) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ unsigned misalignment(const void* pointer) {
  return static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(pointer)) & (kLoadBytes - 1);
}

// Elements before the first 16-byte boundary, at most n.
template <class scalar_t>
__device__ __forceinline__ std::int64_t head_elements(const scalar_t* pointer, std::int64_t n) {
  const std::int64_t head = ((kLoadBytes - misalignment(pointer)) & (kLoadBytes - 1)) / sizeof(scalar_t);
  return head < n ? head : n;
}

}  // namespace curvlab
