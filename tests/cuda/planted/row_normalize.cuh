// SPDX-License-Identifier: Apache-2.0
// y[r, :] = x[r, :] / ||x[r, :]||_2, one block per row. kFault plants one mistake; 0 is right.
#pragma once
#include "common/device.cuh"

namespace planted {

template <int kFault>
__device__ __forceinline__ float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);  // meets fault 2
  return v;
}

// blockDim.x is a multiple of 32; every thread gets the sum.
template <int kFault>
__device__ float block_sum(float v) {
  CURVLAB_SHARED(float, partial, [32]);
  CURVLAB_SHARED(float, total, );
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  v = warp_sum<kFault>(v);
  if (lane == 0) partial[warp] = v;
  if constexpr (kFault != 1) __syncthreads();
  if (warp == 0) {
    const int warps = blockDim.x >> 5;
    v = lane < warps ? partial[lane] : 0.0f;                // fault 1: nothing orders this read after the write
    if (kFault != 2 || lane < 16) v = warp_sum<kFault>(v);  // fault 2: the mask names the lanes that skip it
    if (lane == 0) total = v;
  }
  __syncthreads();  // where the lanes of fault 2 wait meanwhile
  return total;
}

template <int kFault>
__global__ void __launch_bounds__(128)
    row_normalize_kernel(const float* __restrict__ x, float* __restrict__ y, int cols) {
  const float* row = x + static_cast<long long>(blockIdx.x) * cols;
  float* out = y + static_cast<long long>(blockIdx.x) * cols;
  const bool aligned = cols % 4 == 0 || kFault == 9;
  const int quads = aligned ? cols / 4 : 0;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < quads + (kFault == 3 ? 1 : 0); i += blockDim.x) {
    const float4 v = reinterpret_cast<const float4*>(row)[i];  // fault 3: one too far; fault 9: not aligned
    sum = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, sum))));
  }
  for (int i = quads * 4 + threadIdx.x; i < cols; i += blockDim.x) sum = fmaf(row[i], row[i], sum);
  const float scale = 1.0f / sqrtf(block_sum<kFault>(sum));
  for (int i = threadIdx.x; i < cols; i += blockDim.x) out[i] = row[i] * scale;
}

}  // namespace planted
