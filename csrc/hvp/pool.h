// SPDX-License-Identifier: Apache-2.0
// pool_gather and its adjoint pool_scatter: maximum pooling whose choices are kept. index [N, R, C] holds for every
// output the input that won, in [0, H W), or -1 where nothing passes (a ReLU before the pool was off).
//   gather   out[k, n, r, c] = x[k, n, index[n, r, c], c], 0 for -1
//   scatter  out[k, n, i, c] = sum of g[k, n, r, c] over the r with index[n, r, c] = i, r rising
#pragma once

#include <cstdint>

#include "common/elements.h"

namespace curvlab::hvp {

struct PoolArguments {
  std::int64_t directions, samples, size, windows, channels;  // K, N, H W, R, C
  std::int32_t type;                                          // ElementType, not kFloat16
  bool unique;                                                // scatter: no input has won twice
  const std::int32_t* index;
  const void* in;  // x [K, N, H W, C] or g [K, N, R, C]
  void* out;       // [K, N, R, C] or [K, N, H W, C]

  CURVLAB_HD std::int64_t image() const { return size * channels; }
  CURVLAB_HD std::int64_t pooled() const { return windows * channels; }
};

}  // namespace curvlab::hvp
