// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of multi_tensor_norms. One launch: blocks walk over chunks of 64 KB and store one row of partial sums
// per chunk; the block that draws the last ticket adds the rows per tensor, in chunk order, and then the tensors, in
// list order. No atomics on values: the same bits for any grid and any schedule.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "common/load.cuh"
#include "common/reduce.cuh"
#include "common/table.cuh"
#include "norms/multi_tensor_norms.h"

namespace curvlab::norms {

constexpr int kNormsBlockSize = 256;
constexpr int kNormsBlocksPerMultiprocessor = 4;  // 64 registers each; with 3 (80) ptxas 13.0 spills 8 bytes
constexpr int kNormsWarps = kNormsBlockSize / kWarpSize;
constexpr int kLoadsInFlight = 4;                // a thread, and as many of the reference
constexpr std::int64_t kChunksPerThread = 8;     // tensors of at most so many chunks are finished by one thread,
constexpr std::int64_t kChunksPerWarp = 8 * 32;  // of at most so many by one warp, larger ones by the last block

// A thread's share; elements are held as held_t, float or double.
template <class held_t>
struct ThreadSums : RunningSums<double> {
  held_t linf;
  int nonzeros;
};

template <NormMode mode, class held_t>
__device__ __forceinline__ void accumulate_element(ThreadSums<held_t>& sums, held_t x, held_t reference) {
  const double wide = x;  // converted once: conversions run at a quarter of the rate of double additions
  accumulate<mode, double>(sums, wide, fabs(wide), reference);
  if constexpr (mode != NormMode::kL2Only) {
    const held_t size = x < held_t(0) ? -x : x;
    sums.linf = size > sums.linf ? size : sums.linf;
    sums.nonzeros += x != held_t(0);
  }
}

// A strided share of n elements; x and reference (if any) start at the same offset from a 16-byte boundary, or are
// read one element at a time.
template <class scalar_t, NormMode mode>
__device__ __forceinline__ void accumulate_elements(ThreadSums<typename Held<scalar_t>::type>& sums,
                                                    const scalar_t* __restrict__ x,
                                                    const scalar_t* __restrict__ reference, std::int64_t begin,
                                                    std::int64_t end) {
  using held_t = typename Held<scalar_t>::type;
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kNormsBlockSize) {
    held_t r{};
    if constexpr (mode == NormMode::kWithReference) r = load_element(reference[i]);
    accumulate_element<mode>(sums, static_cast<held_t>(load_element(x[i])), r);
  }
}

template <class scalar_t, NormMode mode>
__device__ __forceinline__ void accumulate_load(ThreadSums<typename Held<scalar_t>::type>& sums, const uint4& x,
                                                const uint4& reference) {
  using held_t = typename Held<scalar_t>::type;
  held_t values[kPerLoad<scalar_t>], references[kPerLoad<scalar_t>] = {};
  unpack(x, values, scalar_t{});
  if constexpr (mode == NormMode::kWithReference) unpack(reference, references, scalar_t{});
#pragma unroll
  for (int i = 0; i < kPerLoad<scalar_t>; ++i) accumulate_element<mode>(sums, values[i], references[i]);
}

// `loads` 16-byte loads from aligned pointers, several in flight.
template <class scalar_t, NormMode mode>
__device__ __forceinline__ void accumulate_loads(ThreadSums<typename Held<scalar_t>::type>& sums,
                                                 const uint4* __restrict__ x, const uint4* __restrict__ reference,
                                                 int loads) {
  int i = static_cast<int>(threadIdx.x);
  for (; i + (kLoadsInFlight - 1) * kNormsBlockSize < loads; i += kLoadsInFlight * kNormsBlockSize) {
    uint4 a[kLoadsInFlight], b[kLoadsInFlight] = {};
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) {
      a[k] = __ldg(x + i + k * kNormsBlockSize);
      if constexpr (mode == NormMode::kWithReference) b[k] = __ldg(reference + i + k * kNormsBlockSize);
    }
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) accumulate_load<scalar_t, mode>(sums, a[k], b[k]);
  }
  for (; i < loads; i += kNormsBlockSize) {
    const uint4 a = __ldg(x + i);
    uint4 b{};
    if constexpr (mode == NormMode::kWithReference) b = __ldg(reference + i);
    accumulate_load<scalar_t, mode>(sums, a, b);
  }
}

// The thread's share of one chunk, as a row of sums.
template <class scalar_t, NormMode mode>
__device__ __forceinline__ void accumulate_chunk(const NormEntry& entry, std::int64_t chunk, double (&row)[kColumns]) {
  constexpr std::int64_t chunk_elements = kCudaChunkBytes / sizeof(scalar_t);
  const std::int64_t offset = chunk * chunk_elements;
  const std::int64_t n = entry.numel - offset < chunk_elements ? entry.numel - offset : chunk_elements;
  const scalar_t* x = static_cast<const scalar_t*>(entry.x) + offset;
  const scalar_t* reference = nullptr;
  if constexpr (mode == NormMode::kWithReference) reference = static_cast<const scalar_t*>(entry.reference) + offset;

  std::int64_t head = head_elements(x, n);
  if (mode == NormMode::kWithReference && misalignment(x) != misalignment(reference)) head = n;
  const std::int64_t loads = (n - head) / kPerLoad<scalar_t>;
  const std::int64_t tail = head + loads * kPerLoad<scalar_t>;

  ThreadSums<typename Held<scalar_t>::type> sums;
  sums.clear();
  sums.linf = 0;
  sums.nonzeros = 0;
  accumulate_elements<scalar_t, mode>(sums, x, reference, 0, head);
  const scalar_t* aligned_reference = mode == NormMode::kWithReference ? reference + head : nullptr;
  accumulate_loads<scalar_t, mode>(sums, reinterpret_cast<const uint4*>(x + head),
                                   reinterpret_cast<const uint4*>(aligned_reference), static_cast<int>(loads));
  accumulate_elements<scalar_t, mode>(sums, x, reference, tail, n);

  row[kL1] = sums.l1;
  row[kL2] = sums.l2;
  row[kLinf] = keep_nan(sums.linf, sums.l1);
  row[kNonzeros] = sums.nonzeros;
  row[kDistance] = sums.distance;
  row[kInner] = sums.inner;
  row[kReferenceL2] = sums.reference;
}

template <NormMode mode>
__device__ __forceinline__ void accumulate_chunk(const NormEntry& entry, std::int64_t chunk, double (&row)[kColumns]) {
  switch (entry.type) {
    case kFloat32:
      return accumulate_chunk<float, mode>(entry, chunk, row);
    case kFloat64:
      return accumulate_chunk<double, mode>(entry, chunk, row);
    case kBFloat16:
      return accumulate_chunk<BFloat16Bits, mode>(entry, chunk, row);
    default:
      return accumulate_chunk<Float16Bits, mode>(entry, chunk, row);
  }
}

// Combines the rows of a warp's lanes; every lane then holds the warp's row.
template <NormMode mode>
__device__ __forceinline__ void combine_warp(double (&row)[kColumns]) {
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    if (!is_computed(mode, column)) continue;
    row[column] = column == kLinf ? warp_max_keep_nan(row[column]) : warp_sum(row[column]);
  }
}

// Combines the rows of all threads, warps in order; the result is in thread `column` of the block (columns the mode
// leaves out: 0). `scratch` may be reused after the next barrier.
template <NormMode mode>
__device__ __forceinline__ double combine_block(double (&row)[kColumns], double (&scratch)[kNormsWarps][kColumns]) {
  combine_warp<mode>(row);
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      scratch[threadIdx.x / kWarpSize][column] = is_computed(mode, column) ? row[column] : 0.0;
    }
  }
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x < kColumns) {
    for (int warp = 0; warp < kNormsWarps; ++warp) {
      const double value = scratch[warp][threadIdx.x];
      total = threadIdx.x == kLinf ? max_keep_nan(value, total) : total + value;
    }
  }
  return total;
}

// Sums of partial rows first, first + step, ... < end, compensated. Rows lie column by column: [kColumns][rows].
// volatile: other blocks wrote them during this launch, and a cache of this multiprocessor must not answer.
template <NormMode mode>
__device__ __forceinline__ void add_rows(const volatile double* rows, std::int64_t count, std::int64_t first,
                                         std::int64_t end, std::int64_t step, double (&row)[kColumns]) {
  CompensatedSum sums[kColumns];
  double linf = 0.0;
  for (std::int64_t i = first; i < end; i += step) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!is_computed(mode, column)) continue;
      const double value = rows[column * count + i];
      if (column == kLinf) {
        linf = max_keep_nan(value, linf);
      } else {
        sums[column].add(value);
      }
    }
  }
#pragma unroll
  for (int column = 0; column < kColumns; ++column) row[column] = column == kLinf ? linf : sums[column].value();
}

struct NormsOutput {
  double* tensor_rows;  // [kColumns][tensors], sums
  double* out;          // [tensors + 1, kColumns], values
  std::int64_t tensors;
};

template <NormMode mode>
__device__ __forceinline__ void store_row(const NormsOutput& output, std::int64_t tensor, int column, double sum) {
  if (tensor < output.tensors) output.tensor_rows[column * output.tensors + tensor] = sum;
  output.out[tensor * kColumns + column] = finish(mode, column, sum);
}

template <NormMode mode>
__device__ __forceinline__ void store_row(const NormsOutput& output, std::int64_t tensor,
                                          const double (&row)[kColumns]) {
#pragma unroll
  for (int column = 0; column < kColumns; ++column) store_row<mode>(output, tensor, column, row[column]);
}

// By the last block: chunk rows -> tensor rows -> the global row.
template <NormMode mode, class Table>
__device__ __forceinline__ void finish_tensors(const Table& table, std::int64_t chunks, const double* chunk_rows,
                                               const NormsOutput& output, bool has_large,
                                               double (&scratch)[kNormsWarps][kColumns]) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  double row[kColumns];
  for (std::int64_t t = thread; t < output.tensors; t += kNormsBlockSize) {
    const std::int64_t first = table.entries[t].first_chunk, count = cuda_chunk_count(table.entries[t]);
    if (count > kChunksPerThread) continue;
    add_rows<mode>(chunk_rows, chunks, first, first + count, 1, row);
    store_row<mode>(output, t, row);
  }
  for (std::int64_t t = warp; t < output.tensors; t += kNormsWarps) {
    const std::int64_t first = table.entries[t].first_chunk, count = cuda_chunk_count(table.entries[t]);
    if (count <= kChunksPerThread || count > kChunksPerWarp) continue;
    add_rows<mode>(chunk_rows, chunks, first + lane, first + count, kWarpSize, row);
    combine_warp<mode>(row);
    if (lane == 0) store_row<mode>(output, t, row);
  }
  for (std::int64_t t = 0; has_large && t < output.tensors; ++t) {
    const std::int64_t first = table.entries[t].first_chunk, count = cuda_chunk_count(table.entries[t]);
    if (count <= kChunksPerWarp) continue;
    add_rows<mode>(chunk_rows, chunks, first + thread, first + count, kNormsBlockSize, row);
    const double sum = combine_block<mode>(row, scratch);
    if (thread < kColumns) store_row<mode>(output, t, thread, sum);
    __syncthreads();
  }
  __syncthreads();
  add_rows<mode>(output.tensor_rows, output.tensors, thread, output.tensors, kNormsBlockSize, row);
  const double sum = combine_block<mode>(row, scratch);
  if (thread < kColumns) store_row<mode>(output, output.tensors, thread, sum);
}

// chunk_rows: [kColumns][chunks]. ticket: 0 before and, as atomicInc wraps, after. has_large: some tensor has more than
// kChunksPerWarp chunks.
template <NormMode mode, class Table>
__global__ void __launch_bounds__(kNormsBlockSize, kNormsBlocksPerMultiprocessor)
    multi_tensor_norms_kernel(const __grid_constant__ Table table, const std::int64_t chunks,
                              double* __restrict__ chunk_rows, const NormsOutput output, const bool has_large,
                              unsigned* __restrict__ ticket) {
  CURVLAB_SHARED(double, scratch, [kNormsWarps][kColumns]);
  CURVLAB_SHARED(bool, is_last, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  int t = 0;
  for (std::int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    t = find_entry(table, static_cast<int>(output.tensors), chunk, t,
                   [](const NormEntry& entry) { return static_cast<std::int64_t>(entry.first_chunk); });
    double row[kColumns];
    accumulate_chunk<mode>(table.entries[t], chunk - table.entries[t].first_chunk, row);
    const double sum = combine_block<mode>(row, scratch);
    if (thread < kColumns && is_computed(mode, thread)) chunk_rows[thread * chunks + chunk] = sum;
    __syncthreads();  // scratch is free again
  }
  __threadfence();  // this block's rows are seen before its ticket
  __syncthreads();
  if (thread == 0) is_last[0] = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last[0]) return;
  __threadfence();
  finish_tensors<mode>(table, chunks, chunk_rows, output, has_large, scratch);
}

}  // namespace curvlab::norms
