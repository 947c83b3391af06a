// SPDX-License-Identifier: Apache-2.0
// g = x x^T for x [n, k], row-major, in tiles of 16 x 16 threads. kFault plants one mistake; 0 is right.
#pragma once
#include "common/device.cuh"

namespace planted {

constexpr int kTile = 16;

template <int kFault>
__global__ void gram_kernel(const float* __restrict__ x, float* __restrict__ g, int n, int k) {
  CURVLAB_SHARED(float, a, [kTile][kTile]);
  CURVLAB_SHARED(float, b, [kTile][kTile + 1]);
  const int tx = threadIdx.x, ty = threadIdx.y;
  const int row = blockIdx.y * kTile + ty, col = blockIdx.x * kTile + tx, other = blockIdx.x * kTile + ty;
  float acc = 0.0f;
  for (int start = 0; start < k; start += kTile) {
    const bool inside = start + tx < k;
    if constexpr (kFault == 4) {
      if (inside && row < n) a[ty][tx] = x[row * k + start + tx];
      if (inside && other < n) b[ty][tx] = x[other * k + start + tx];
    } else {
      a[ty][tx] = inside && row < n ? x[row * k + start + tx] : 0.0f;  // fault 5: while others still read it
      b[ty][tx] = inside && other < n ? x[other * k + start + tx] : 0.0f;
    }
    __syncthreads();
    for (int i = 0; i < kTile; ++i) {
      acc = fmaf(a[ty][i], b[tx][i], acc);  // fault 4: the edge of the tile was never written
    }
    if constexpr (kFault != 5) __syncthreads();
  }
  if constexpr (kFault == 6) {
    if (row >= n || col >= n) return;
    __syncthreads();  // fault 6: some threads have returned
  }
  if (row < n && col < n) g[row * n + col] = acc;
}

}  // namespace planted
