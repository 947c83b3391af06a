// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of activation_factors: an element a thread, in double. Run once a batch, not once a product.
#pragma once

#include <cstdint>

#include "hvp/activation_factors.h"
#include "hvp/tile.cuh"

namespace curvlab::hvp {

constexpr int kActivationBlocksPerMultiprocessor = 4;

template <class scalar_t, Activation kind>
__global__ void __launch_bounds__(kBlockSize, kActivationBlocksPerMultiprocessor)
    activation_factors_kernel(const __grid_constant__ ActivationArguments x) {
  const scalar_t* z = static_cast<const scalar_t*>(x.z);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kBlockSize;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlockSize + threadIdx.x; i < x.elements; i += step) {
    const double at = static_cast<double>(load_element(z[i]));
    if constexpr (kind == Activation::kRelu) {
      static_cast<std::uint8_t*>(x.first)[i] = passes(at);
    } else {
      const Derivatives value = derivatives<kind>(at, x.parameters);
      store_element(static_cast<scalar_t*>(x.first)[i], value.first);
      if (x.second) {
        const double delta = static_cast<double>(load_element(static_cast<const scalar_t*>(x.delta)[i]));
        store_element(static_cast<scalar_t*>(x.second)[i], value.second * delta);
      }
    }
  }
}

}  // namespace curvlab::hvp
