// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of pool_gather and pool_scatter: one sample in one direction. Included by cpu_<isa>.cpp only.
#pragma once

#include "hvp/pool.h"
#include "hvp/vectors_cpu.h"

namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY {

template <class scalar_t>
static void gather_image(const PoolArguments& pool, std::int64_t k, std::int64_t n) {
  const std::int64_t channels = pool.channels, image = k * pool.samples + n;
  const scalar_t* x = static_cast<const scalar_t*>(pool.in) + image * pool.image();
  scalar_t* out = static_cast<scalar_t*>(pool.out) + image * pool.pooled();
  const std::int32_t* index = pool.index + n * pool.pooled();
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
  scatter_windows(pool, g, index, out);
}

}  // namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY
