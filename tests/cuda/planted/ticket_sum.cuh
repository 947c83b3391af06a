// SPDX-License-Identifier: Apache-2.0
// *sum = sum_i x[i]^2 in one launch: a partial sum per block, a ticket, and the last block adds the partial sums up in
// their order. The ticket resets itself. kFault plants one mistake; 0 is right.
#pragma once
#include "common/device.cuh"

namespace planted {

template <int kFault>
__global__ void ticket_sum_kernel(const float* __restrict__ x, int n, double* __restrict__ partial,
                                  unsigned* __restrict__ ticket, double* __restrict__ sum) {
  CURVLAB_DYN_SHARED(double, scratch);  // blockDim.x doubles
  CURVLAB_SHARED(bool, is_last, );
  double acc = 0.0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    acc = fma(static_cast<double>(x[i]), static_cast<double>(x[i]), acc);
  }
  scratch[threadIdx.x + (kFault == 10 ? 1 : 0)] = acc;  // fault 10: the last thread writes behind the array
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half >>= 1) {
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = scratch[0];
    if constexpr (kFault != 7 && kFault != 11) __threadfence();
    is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    if constexpr (kFault == 11) __threadfence();  // too late: another block may have drawn the last ticket since
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if constexpr (kFault == 8) {
    if (threadIdx.x == 0) *sum = 0.0;
    __syncthreads();
    for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) {  // fault 8: the compiler keeps *sum in a register
      *sum += partial[i];                                        // fault 8: many threads, no atomic
    }
  } else if (threadIdx.x == 0) {
    double total = 0.0;
    for (unsigned i = 0; i < gridDim.x; ++i) {
      total += partial[i];  // fault 7, fault 11: nothing orders this read after the write
    }
    *sum = total;
  }
}

}  // namespace planted
