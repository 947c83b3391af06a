// SPDX-License-Identifier: Apache-2.0
// Sums over rows on the CPU: a row of doubles for every chunk and direction, then the chunks in order.
#pragma once

#include <cstdint>
#include <vector>

#include "hvp/arguments.h"

namespace curvlab::hvp {

class ChunkSums {
 public:
  ChunkSums(std::int64_t kinds, std::int64_t chunks, std::int64_t directions, std::int64_t channels)
      : chunks_(chunks),
        directions_(directions),
        channels_(channels),
        values_(static_cast<std::size_t>(kinds * chunks * directions * channels)) {}

  // Where a chunk of a direction is summed; null without sums.
  double* row(std::int64_t kind, std::int64_t chunk, std::int64_t k) {
    if (values_.empty()) return nullptr;
    return values_.data() + ((kind * chunks_ + chunk) * directions_ + k) * channels_;
  }

  // out[k, c] (+)= sum over chunks + inv_std[c] dot[k, c].
  void finish(std::int64_t kind, const at::Tensor& out, bool accumulate, const at::Tensor& inv_std,
              const at::Tensor& dot) {
    if (out.scalar_type() == at::kDouble) {
      finish<double>(kind, out, accumulate, inv_std, dot);
    } else {
      finish<float>(kind, out, accumulate, inv_std, dot);
    }
  }

 private:
  template <class acc_t>
  void finish(std::int64_t kind, const at::Tensor& out, bool accumulate, const at::Tensor& inv_std,
              const at::Tensor& dot) {
    const acc_t* scale = dot.defined() ? inv_std.const_data_ptr<acc_t>() : nullptr;
    std::vector<double> total(static_cast<std::size_t>(channels_));
    for (std::int64_t k = 0; k < directions_; ++k) {
      acc_t* to = out.mutable_data_ptr<acc_t>() + k * out.stride(0);
      const acc_t* moved = dot.defined() ? dot.const_data_ptr<acc_t>() + k * dot.stride(0) : nullptr;
      for (double& value : total) value = 0.0;
      for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const double* part = row(kind, chunk, k);
        for (std::int64_t c = 0; c < channels_; ++c) total[c] += part[c];
      }
      for (std::int64_t c = 0; c < channels_; ++c) {
        if (moved != nullptr) total[c] += static_cast<double>(scale[c]) * static_cast<double>(moved[c]);
        to[c] = static_cast<acc_t>(accumulate ? static_cast<double>(to[c]) + total[c] : total[c]);
      }
    }
  }

  std::int64_t chunks_, directions_, channels_;
  std::vector<double> values_;
};

}  // namespace curvlab::hvp
