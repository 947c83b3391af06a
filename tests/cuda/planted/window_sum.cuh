// SPDX-License-Identifier: Apache-2.0
// y[i] = sum over channels c of x[c, i - 1] + x[c, i] + x[c, i + 1], zeros outside, for x [channels, n]: windows of 64
// positions in two buffers, one filled by asynchronous copies while the other is read; the results leave through a
// warp's own scratch. kFault plants one mistake; 0 is right.
#pragma once
#include "sparse_conv/async_copy.cuh"

namespace planted {

constexpr int kPositions = 64;

template <int kFault>
__device__ __forceinline__ void stage(const float* row, int start, int n, float* window) {
  for (int i = threadIdx.x; i < kPositions + 2; i += kPositions) {
    const int from = start + i - 1;
    if (from >= 0 && (kFault == 15 || from < n)) {
      curvlab::copy_async(window + i, row + from);  // fault 13: others still read it; fault 15: behind the row
    } else {
      window[i] = 0.0f;
    }
  }
}

template <int kFault>
__global__ void __launch_bounds__(kPositions)
    window_sum_kernel(const float* __restrict__ x, float* __restrict__ y, int channels, int n) {
  CURVLAB_SHARED(float, window, [2][kPositions + 2]);
  CURVLAB_SHARED(float, scratch, [kPositions]);
  const int thread = threadIdx.x, start = blockIdx.x * kPositions;
  float sum = 0.0f;
  stage<kFault>(x, start, n, window[0]);
  curvlab::commit_copies();
  for (int c = 0; c < channels; ++c) {
    if (c + 1 < channels) stage<kFault>(x + (c + 1) * n, start, n, window[(c + 1) % 2]);
    curvlab::commit_copies();
    if constexpr (kFault != 12) curvlab::wait_for_copies<1>();  // fault 15: where the host makes late copies
    __syncthreads();
    const float* here = window[c % 2] + thread;
    sum += here[0] + here[1] + here[2];  // fault 12: it has not arrived; fault 13: it is overwritten meanwhile
    if constexpr (kFault != 13) __syncthreads();
  }
  scratch[thread] = sum;
  if constexpr (kFault != 14) __syncwarp();
  const int other = thread ^ 31;
  if (start + other < n) y[start + other] = scratch[other];  // fault 14: nothing orders this read after the write
}

}  // namespace planted
