// SPDX-License-Identifier: Apache-2.0
// self_check: every word of CUDA that the harness speaks, against its definition in the CUDA C++ guide. Prints what is
// wrong; exit status 0 if nothing is.
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "common/device.cuh"

namespace {

int wrong = 0;
void expect(bool right, const std::string& what) {
  if (right) return;
  std::printf("WRONG %s\n", what.c_str());
  ++wrong;
}

constexpr unsigned kAll = 0xffffffffu;

// ---- warp operations ----------------------------------------------------------------------------------------------
__global__ void warp_kernel(int* out) {  // 16 results a lane
  const int lane = threadIdx.x & 31;
  int* mine = out + 16 * threadIdx.x;
  mine[0] = __shfl_sync(kAll, lane, 5);
  mine[1] = __shfl_sync(kAll, lane, 9, 8);
  mine[2] = __shfl_up_sync(kAll, lane, 3);
  mine[3] = __shfl_up_sync(kAll, lane, 3, 16);
  mine[4] = __shfl_down_sync(kAll, lane, 4);
  mine[5] = __shfl_down_sync(kAll, lane, 4, 8);
  mine[6] = __shfl_xor_sync(kAll, lane, 17);
  mine[7] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  mine[8] = __any_sync(kAll, lane == 31);
  mine[9] = __all_sync(kAll, lane < 31);
  mine[10] = __reduce_add_sync(kAll, lane);
  mine[11] = __reduce_max_sync(kAll, lane);
  mine[12] = lane < 10 ? static_cast<int>(__ballot_sync(0x3ffu, 1)) : static_cast<int>(__ballot_sync(~0x3ffu, 1));
  mine[13] = __shfl_xor_sync(kAll, static_cast<double>(lane) + 0.5, 1) == (lane ^ 1) + 0.5;
  mine[14] = __all_sync(kAll, 1);
  mine[15] = __reduce_min_sync(kAll, lane + 7);
}

void warp_operations() {
  std::vector<int> out(64 * 16);
  CURVLAB_LAUNCH(warp_kernel, 1, 64, 0, nullptr, out.data());
  unsigned thirds = 0;
  for (int l = 0; l < 32; l += 3) thirds |= 1u << l;
  for (int t = 0; t < 64; ++t) {
    const int l = t & 31, *got = &out[16 * t];
    const int want[16] = {5,
                          (l & ~7) + 1,
                          l < 3 ? l : l - 3,
                          l % 16 < 3 ? l : l - 3,
                          l > 27 ? l : l + 4,
                          l % 8 > 3 ? l : l + 4,
                          l ^ 17,
                          static_cast<int>(thirds),
                          1,
                          0,
                          496,
                          31,
                          l < 10 ? 0x3ff : static_cast<int>(~0x3ffu),
                          1,
                          1,
                          7};
    for (int i = 0; i < 16; ++i)
      expect(got[i] == want[i], "warp operation " + std::to_string(i) + " in thread " + std::to_string(t));
  }
}

// ---- barriers, indices, shared memory -----------------------------------------------------------------------------
__global__ void block_kernel(int* out, float* poison) {
  CURVLAB_SHARED(float, first, [3][5]);
  CURVLAB_SHARED(float, second, );
  CURVLAB_DYN_SHARED(float, dynamic);
  const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (t == 0) {
    poison[3 * b] = first[2][4];
    poison[3 * b + 1] = second;
    poison[3 * b + 2] = dynamic[7];
  }
  __syncthreads();
  if (t == 0) first[2][4] = second = dynamic[7] = 1.0f;  // the next block must not see it
  const int count = __syncthreads_count(t % 2), any = __syncthreads_or(t == 3), all = __syncthreads_and(t == 3);
  out[b * 30 + t] = count * 10000 + any * 1000 + all * 100 + t;
}

void blocks() {
  std::vector<int> out(2 * 3 * 2 * 30);
  std::vector<float> poison(3 * 12);
  CURVLAB_LAUNCH(block_kernel, dim3(2, 3, 2), dim3(5, 3, 2), 8 * sizeof(float), nullptr, out.data(), poison.data());
  for (size_t i = 0; i < out.size(); ++i)
    expect(out[i] == 15 * 10000 + 1000 + static_cast<int>(i) % 30, "barrier or index " + std::to_string(i));
  for (float p : poison) expect(p != p, "shared memory is fresh for every block");
}

// ---- atomics ------------------------------------------------------------------------------------------------------
__global__ void atomics_kernel(unsigned* u, double* d) {
  const unsigned t = threadIdx.x;
  atomicAdd(u + 0, 2);
  atomicInc(u + 1, 6u);
  atomicDec(u + 2, 6u);
  atomicMax(u + 3, t);
  atomicMin(u + 4, t);
  atomicOr(u + 5, 1u << (t % 32));
  atomicAnd(u + 6, ~(1u << (t % 8)));
  atomicXor(u + 7, 3u);
  atomicSub(u + 8, 1u);
  atomicCAS(u + 9, t, t + 1);
  atomicAdd(d, 0.5);
  if (t == 20) u[10] = atomicExch(u + 11, 9u);
}

void atomics() {
  std::vector<unsigned> u = {0, 0, 0, 0, 99, 0, kAll, 0, 100, 0, 0, 4};
  double d = 1.0;
  CURVLAB_LAUNCH(atomics_kernel, 1, 50, 0, nullptr, u.data(), &d);
  const std::vector<unsigned> want = {100, 50 % 7, 6, 49, 0, kAll, kAll << 8, 0, 50, u[9], 4, 9};
  for (size_t i = 0; i < u.size(); ++i) expect(u[i] == want[i], "atomic " + std::to_string(i));
  expect(u[9] >= 1 && u[9] <= 50, "atomicCAS");
  expect(d == 26.0, "atomicAdd on double");
}

// ---- 16-bit floats ------------------------------------------------------------------------------------------------
void half_types() {
  for (unsigned i = 0; i < 65536; ++i) {
    __half h;
    __nv_bfloat16 b;
    h.bits = b.bits = static_cast<uint16_t>(i);
    const float fh = h, fb = b;
    expect(fh != fh || __half(fh).bits == i, "float16 there and back");
    expect(fb != fb || __nv_bfloat16(fb).bits == i, "bfloat16 there and back");
  }
  expect(__half(65519.0f).bits == 0x7bff && __half(65520.0f).bits == 0x7c00, "float16 overflow");
  expect(__half(0x1p-25f).bits == 0 && __half(0x1.002p-25f).bits == 1, "float16 underflow");
  expect(__half(1.0f + 0x1p-11f).bits == 0x3c00 && __half(1.0f + 0x3p-11f).bits == 0x3c02, "float16 ties to even");
  expect(float(__half(std::nanf(""))) != float(__half(std::nanf(""))), "float16 NaN");
  expect(__nv_bfloat16(1.0f + 0x1p-8f).bits == 0x3f80 && __nv_bfloat16(1.0f + 0x3p-8f).bits == 0x3f82, "bfloat16 ties");
}

// ---- what must stop a launch, or make it fail as on a device
// ---------------------------------------------------------
__global__ void nothing_kernel() {}
__global__ void wrong_mask_kernel() {
  if (threadIdx.x < 8) __shfl_sync(0xfu, 1, 0);
}
__global__ void crossed_masks_kernel() {
  if (threadIdx.x % 32 < 16) {
    __syncwarp(kAll);
  } else {
    __syncwarp(0xffff0001u);
  }
}
__global__ void different_operations_kernel() {
  if (threadIdx.x % 2) {
    __syncwarp(kAll);
  } else {
    __ballot_sync(kAll, 1);
  }
}
__global__ void different_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void too_much_shared_kernel() {
  CURVLAB_SHARED(float, a, [7000]);
  CURVLAB_SHARED(float, b, [7000]);
  a[0] = b[0] = 0.0f;
}
__global__ void nested_kernel() { CURVLAB_LAUNCH(nothing_kernel, 1, 1, 0, nullptr); }

void stops(void (*kernel)(), const std::string& words) {
  std::string message = "nothing";
  try {
    CURVLAB_LAUNCH(kernel, 2, 64, 0, nullptr);
  } catch (const simt::Fault& fault) {
    message = fault.what();
  }
  expect(message.find(words) != std::string::npos, "'" + words + "' should be in '" + message + "'");
  expect(cudaGetLastError() == cudaSuccess, "a fault is an exception, not an error code");
}

void stopped_launches() {
  stops(wrong_mask_kernel, "the calling lane is not in its own mask");
  stops(crossed_masks_kernel, "wait for each other under different masks");
  stops(different_operations_kernel, "other lanes of the mask wait in");
  stops(different_barriers_kernel, "other threads of the block wait in");
  stops(too_much_shared_kernel, "48 KiB");
  stops(nested_kernel, "may not launch a kernel");
  CURVLAB_LAUNCH(nothing_kernel, 1, 1024, 0, nullptr);  // and the next launch is a fresh one
}

void fails(dim3 grid, dim3 block, size_t smem, cudaError_t error) {
  simt::statistics = {};
  CURVLAB_LAUNCH(nothing_kernel, grid, block, smem, nullptr);
  expect(simt::statistics.blocks == 0, "a refused launch runs nothing");
  expect(cudaPeekAtLastError() == error && cudaGetLastError() == error, cudaGetErrorName(error));
  expect(cudaGetLastError() == cudaSuccess, "reading the error clears it");
}

void refused_launches() {
  fails(0, 32, 0, cudaErrorInvalidConfiguration);
  fails(dim3(1, 65536), 32, 0, cudaErrorInvalidConfiguration);
  fails(1, 0, 0, cudaErrorInvalidConfiguration);
  fails(1, 1025, 0, cudaErrorInvalidConfiguration);
  fails(1, dim3(4, 4, 65), 0, cudaErrorInvalidConfiguration);
  fails(1, 32, 48 * 1024 + 1, cudaErrorInvalidValue);
}

}  // namespace

int main() {
  for (int order = 0; order < 3; ++order) {
    simt::options = {static_cast<simt::Order>(order), 5};
    warp_operations();
    blocks();
    atomics();
    stopped_launches();
    refused_launches();
  }
  half_types();
  return wrong != 0;
}
