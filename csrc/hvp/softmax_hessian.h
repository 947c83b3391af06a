// SPDX-License-Identifier: Apache-2.0
// softmax_hessian_product: the Hessian of the cross-entropy by its logits, w_n (diag p - p p^T), times u, for K
// directions. Centered at the label y, where p_y -> 1 on a fitted sample and p_c (u_c - sum p u) would cancel:
//   s = sum_c p_c (u_c - u_y),  out_c = w_n p_c (u_c - u_y - s),  out_y = -w_n p_y s
// p [N, C], label [N] (outside [0, C): centered at 0), weight [N] (0: a row of zeros), u and out [K, N, C].
#pragma once

#include <cstdint>

#include "common/elements.h"

namespace curvlab::hvp {

struct SoftmaxArguments {
  std::int64_t directions, samples, classes;  // K, N, C
  std::int32_t type;                          // ElementType of u and out, not kFloat16
  const void* p;                              // acc_t
  const std::int64_t* label;
  const void* weight;  // acc_t
  const void* u;
  void* out;
};

}  // namespace curvlab::hvp
