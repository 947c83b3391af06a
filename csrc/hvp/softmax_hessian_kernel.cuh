// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of softmax_hessian_product: a warp a row, its sum in double and in a fixed order.
#pragma once

#include <cstdint>

#include "common/reduce.cuh"
#include "hvp/softmax_hessian.h"
#include "hvp/tile.cuh"

namespace curvlab::hvp {

constexpr int kSoftmaxBlocksPerMultiprocessor = 5;
constexpr int kSoftmaxWarps = kBlockSize / kWarpSize;

template <class scalar_t>
__global__ void __launch_bounds__(kBlockSize, kSoftmaxBlocksPerMultiprocessor)
    softmax_hessian_kernel(const __grid_constant__ SoftmaxArguments x) {
  using acc_t = typename Held<scalar_t>::type;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t rows = x.directions * x.samples, step = static_cast<std::int64_t>(gridDim.x) * kSoftmaxWarps;
  std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kSoftmaxWarps + threadIdx.x / kWarpSize;
  for (; row < rows; row += step) {
    const std::int64_t n = row % x.samples;
    const acc_t* p = static_cast<const acc_t*>(x.p) + n * x.classes;
    const scalar_t* u = static_cast<const scalar_t*>(x.u) + row * x.classes;
    scalar_t* out = static_cast<scalar_t*>(x.out) + row * x.classes;
    const acc_t weight = static_cast<const acc_t*>(x.weight)[n];
    const std::int64_t label = x.label[n];
    const acc_t center = load_element(u[label >= 0 && label < x.classes ? label : 0]);
    double sum = 0.0;
    for (std::int64_t c = lane; c < x.classes; c += kWarpSize) {
      sum += static_cast<double>(p[c]) * static_cast<double>(load_element(u[c]) - center);
    }
    const acc_t mean = static_cast<acc_t>(warp_sum(sum));
    __syncwarp();  // every lane has read its center: out may take the place of u
    for (std::int64_t c = lane; c < x.classes; c += kWarpSize) {
      const acc_t product = weight * (p[c] * (load_element(u[c]) - center - mean));
      store_held(out + c, weight == acc_t(0) ? acc_t(0) : product);
    }
  }
}

}  // namespace curvlab::hvp
