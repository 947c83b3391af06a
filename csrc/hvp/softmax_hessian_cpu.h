// SPDX-License-Identifier: Apache-2.0
// The vectorized CPU kernel of softmax_hessian_product: a sample in a direction at a time. Included by cpu_<isa>.cpp
// only.
#pragma once

#include "hvp/rows_cpu.h"
#include "hvp/softmax_hessian.h"

namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY {

CURVLAB_INLINE double sum_all(DoubleLanes lanes) { return sum_lanes(lanes); }
CURVLAB_INLINE double sum_all(FullFloatLanes lanes) {
  FloatLanes halves[2];
  memcpy(halves, &lanes, sizeof halves);
  return sum_lanes(widen_float(halves[0]) + widen_float(halves[1]));
}

template <class scalar_t>
CURVLAB_INLINE void softmax_row(const SoftmaxArguments& arguments, std::int64_t k, std::int64_t n) {
  using V = Vectors<scalar_t>;
  using acc_t = typename V::acc_t;
  const std::int64_t classes = arguments.classes, row = (k * arguments.samples + n) * classes;
  const acc_t* p = static_cast<const acc_t*>(arguments.p) + n * classes;
  const scalar_t* u = static_cast<const scalar_t*>(arguments.u) + row;
  scalar_t* out = static_cast<scalar_t*>(arguments.out) + row;
  const acc_t weight = static_cast<const acc_t*>(arguments.weight)[n];
  if (weight == acc_t(0)) {
    memset(static_cast<void*>(out), 0, static_cast<unsigned long>(classes) * sizeof(scalar_t));
    return;
  }
  const std::int64_t label = arguments.label[n];
  const acc_t center = static_cast<acc_t>(load_element(u[label >= 0 && label < classes ? label : 0]));
  double mean = 0.0;
  for (std::int64_t first = 0; first < classes; first += kBlock) {
    typename V::Lanes sum{};
    const std::int64_t length = classes - first < kBlock ? classes - first : kBlock;
    for_registers<V::kWidth>(length,
                             [&]<int registers, bool whole>(std::int64_t j, int lanes) __attribute__((always_inline)) {
                               for (int r = 0; r < registers; ++r) {
                                 const std::int64_t i = first + j + r * V::kWidth;
                                 sum += load_some<whole>(p + i, lanes) * (load_some<whole>(u + i, lanes) - center);
                               }
                             });
    mean += sum_all(sum);
  }
  const acc_t s = static_cast<acc_t>(mean);
  for_registers<V::kWidth>(
      classes, [&]<int registers, bool whole>(std::int64_t j, int lanes) __attribute__((always_inline)) {
        for (int r = 0; r < registers; ++r) {
          const std::int64_t i = j + r * V::kWidth;
          const auto product = load_some<whole>(p + i, lanes) * ((load_some<whole>(u + i, lanes) - center) - s);
          store_some<whole>(out + i, weight * product, lanes);
        }
      });
}

// Rows [begin, end) of [K N, C].
template <class scalar_t>
static void softmax_rows(const SoftmaxArguments& arguments, std::int64_t begin, std::int64_t end) {
  std::int64_t k = begin / arguments.samples, n = begin % arguments.samples;
  for (std::int64_t row = begin; row < end; ++row) {
    softmax_row<scalar_t>(arguments, k, n);
    if (++n == arguments.samples) n = 0, ++k;
  }
}

}  // namespace curvlab::hvp::CURVLAB_CPU_CAPABILITY
