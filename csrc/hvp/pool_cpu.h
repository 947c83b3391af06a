// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of pool_gather and pool_scatter: one sample in one direction. Included by cpu_<isa>.cpp only.
#pragma once

#include "hvp/pool.h"
#include "hvp/vectors_cpu.h"

namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY {

#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
// 16 channels of one window at once, where offsets within an image fit 32 bits: with single loads and stores the pools
// took 18 % of the GGN product of a CNN with 32 to 128 channels.
struct PooledLanes {
  __mmask16 live;
  __m512i offset;
};

CURVLAB_INLINE PooledLanes pooled_lanes(const std::int32_t* index, std::int64_t c, std::int64_t channels) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 inside = channels - c >= 16 ? 0xffff : static_cast<__mmask16>((1u << (channels - c)) - 1);
  const __m512i position = _mm512_maskz_loadu_epi32(inside, index + c);
  const __m512i row = _mm512_mullo_epi32(position, _mm512_set1_epi32(static_cast<int>(channels)));
  return {_mm512_mask_cmpge_epi32_mask(inside, position, _mm512_setzero_si512()),
          _mm512_add_epi32(row, _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(c))))};
}

static void gather_lanes(const PoolArguments& pool, const float* x, const std::int32_t* index, float* out) {
  const std::int64_t channels = pool.channels;
  for (std::int64_t r = 0; r < pool.windows; ++r, index += channels, out += channels) {
    for (std::int64_t c = 0; c < channels; c += 16) {
      const PooledLanes lanes = pooled_lanes(index, c, channels);
      const __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes.live, lanes.offset, x, 4);
      const __mmask16 inside = channels - c >= 16 ? 0xffff : static_cast<__mmask16>((1u << (channels - c)) - 1);
      _mm512_mask_storeu_ps(out + c, inside, value);
    }
  }
}

// Of windows that do not meet: nothing is added.
static void scatter_lanes(const PoolArguments& pool, const float* g, const std::int32_t* index, float* out) {
  const std::int64_t channels = pool.channels;
  for (std::int64_t r = 0; r < pool.windows; ++r, index += channels, g += channels) {
    for (std::int64_t c = 0; c < channels; c += 16) {
      const PooledLanes lanes = pooled_lanes(index, c, channels);
      const __m512 value = _mm512_maskz_loadu_ps(lanes.live, g + c);
      _mm512_mask_i32scatter_ps(out, lanes.live, lanes.offset, value, 4);
    }
  }
}

CURVLAB_INLINE bool fits_lanes(const PoolArguments& pool) { return pool.image() < (std::int64_t{1} << 31); }
#endif

template <class scalar_t>
static void gather_image(const PoolArguments& pool, std::int64_t k, std::int64_t n) {
  const std::int64_t channels = pool.channels, image = k * pool.samples + n;
  const scalar_t* x = static_cast<const scalar_t*>(pool.in) + image * pool.image();
  scalar_t* out = static_cast<scalar_t*>(pool.out) + image * pool.pooled();
  const std::int32_t* index = pool.index + n * pool.pooled();
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(scalar_t) == 4) {
    if (fits_lanes(pool)) return gather_lanes(pool, x, index, out);
  }
#endif
  for (std::int64_t r = 0; r < pool.windows; ++r, index += channels, out += channels) {
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t i = index[c];
      const scalar_t value = x[(i < 0 ? 0 : i) * channels + c];
      out[c] = i < 0 ? scalar_t{} : value;  // no branch: which inputs win is not foreseen
    }
  }
}

CURVLAB_INLINE void accumulate(float& to, float value) { to += value; }
CURVLAB_INLINE void accumulate(double& to, double value) { to += value; }
CURVLAB_INLINE void accumulate(float& to, BFloat16Bits value) { to += load_element(value); }
CURVLAB_INLINE void accumulate(BFloat16Bits& to, BFloat16Bits value) { to = value; }  // only where windows do not meet

template <class scalar_t, class sum_t>
CURVLAB_INLINE void scatter_windows(const PoolArguments& pool, const scalar_t* g, const std::int32_t* index,
                                    sum_t* out) {
  const std::int64_t channels = pool.channels;
  sum_t dropped{};
  for (std::int64_t r = 0; r < pool.windows; ++r, index += channels, g += channels) {
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t i = index[c];
      accumulate(*(i < 0 ? &dropped : out + i * channels + c), g[c]);
    }
  }
}

// scratch: size * channels floats, for bfloat16 windows that may meet.
template <class scalar_t>
static void scatter_image(const PoolArguments& pool, std::int64_t k, std::int64_t n, float* scratch) {
  const std::int64_t image = k * pool.samples + n;
  const scalar_t* g = static_cast<const scalar_t*>(pool.in) + image * pool.pooled();
  scalar_t* out = static_cast<scalar_t*>(pool.out) + image * pool.image();
  const std::int32_t* index = pool.index + n * pool.pooled();
  if constexpr (sizeof(scalar_t) == 2) {
    if (!pool.unique) {
      memset(scratch, 0, static_cast<unsigned long>(pool.image()) * sizeof(float));
      scatter_windows(pool, g, index, scratch);
      for (std::int64_t i = 0; i < pool.image(); ++i) out[i] = bfloat16_from_float(scratch[i]);
      return;
    }
  }
  memset(static_cast<void*>(out), 0, static_cast<unsigned long>(pool.image()) * sizeof(scalar_t));
#if defined(CURVLAB_CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(scalar_t) == 4) {
    if (pool.unique && fits_lanes(pool)) return scatter_lanes(pool, g, index, out);
  }
#endif
  scatter_windows(pool, g, index, out);
}

}  // namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY
