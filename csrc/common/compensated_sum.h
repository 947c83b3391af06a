// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/hd.h"

namespace curvlab {

// A sum with its rounding errors beside it (Knuth's two-sum): the error of 1e5 chunks stays near one unit in the last
// place, in a fixed order.
struct CompensatedSum {
  double sum = 0.0;
  double error = 0.0;
  CURVLAB_HD void add(double value) {
    const double total = sum + value;
    const double part = total - sum;
    error += (sum - (total - part)) + (value - part);
    sum = total;
  }
  // An infinite sum has error Inf - Inf = NaN: then the sum itself is the answer.
  CURVLAB_HD double value() const { return sum - sum == 0.0 ? sum + error : sum; }
};

}  // namespace curvlab
