// SPDX-License-Identifier: Apache-2.0
// multi_tensor_norms: for every tensor x_t of a list, with its reference r_t, and for the whole list as one vector,
//   l1 = sum |x_i|,  l2 = sqrt(sum x_i^2),  linf = max |x_i|,  nonzeros = #{i : x_i != 0} (a NaN counts),
//   distance = sqrt(sum (x_i - r_i)^2),  inner = sum x_i r_i,  reference_l2 = sqrt(sum r_i^2).
// out: float64 [T + 1, 7], the columns in that order, the last row global. An empty tensor has zeros.
// Products of two floats are exact in double, so float inputs err only in the accumulation, which is in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/compensated_sum.h"
#include "common/elements.h"
#include "common/hd.h"

namespace curvlab::norms {

enum Column { kL1, kL2, kLinf, kNonzeros, kDistance, kInner, kReferenceL2, kColumns };

// What to compute; columns left out are NaN.
enum class NormMode : std::int32_t { kNorms = 0, kWithReference = 1, kL2Only = 2 };

struct NormEntry {
  const void* x;
  const void* reference;  // null without a reference
  std::int64_t numel;
  std::uint32_t first_chunk;  // index of this tensor's first chunk in the whole list
  std::int32_t type;          // ElementType
};
static_assert(sizeof(NormEntry) == 32, "1000 entries must fit the 32,764 bytes of kernel parameters");

constexpr int kSmallTable = 96;    // entries of the smaller parameter block: 3 KB are copied per launch, not 32
constexpr int kLargeTable = 1000;  // entries that fit into the parameters of one launch
constexpr std::int64_t kCudaChunkBytes = 64 * 1024;

CURVLAB_HD std::int64_t cuda_chunk_count(const NormEntry& entry) {
  const std::int64_t elements = kCudaChunkBytes / element_size(entry.type);
  return (entry.numel + elements - 1) / elements;
}

// Fills first_chunk of every entry; returns the number of chunks, or -1 if they do not fit 32 bits.
template <class ChunkCount>
std::int64_t assign_chunks(NormEntry* entries, std::int64_t tensors, ChunkCount chunk_count) {
  std::int64_t chunks = 0;
  for (std::int64_t t = 0; t < tensors; ++t) {
    entries[t].first_chunk = static_cast<std::uint32_t>(chunks);
    chunks += chunk_count(entries[t]);
    if (chunks > INT64_C(0xffffffff)) return -1;
  }
  return chunks;
}

// For the CUDA launcher; the CPU kernel has chunks of its own size.
inline std::int64_t assign_cuda_chunks(NormEntry* entries, std::int64_t tensors) {
  // A lambda: an always_inline function has no address when the compiler does not inline through the pointer (-O1).
  return assign_chunks(entries, tensors, [](const NormEntry& entry) { return cuda_chunk_count(entry); });
}

// Running sums over one tensor or a part of it, in double or in vectors of doubles.
template <class Wide>
struct RunningSums {
  Wide l1, l2, distance, inner, reference;

  // Member by member: default initializers of vectors made g++ 12 clear the whole object in memory (rep stos).
  CURVLAB_HD void clear() { l1 = l2 = distance = inner = reference = Wide{}; }
};

// The accumulation step. linf and nonzeros need no double: the kernels take them from the elements as they are. Their
// max may drop a NaN: l1, a sum of terms >= 0, is NaN exactly if some x is, and keep_nan() puts it back, one comparison
// a chunk instead of one an element.
template <NormMode mode, class Wide>
CURVLAB_HD void accumulate(RunningSums<Wide>& sums, Wide x, Wide magnitude, Wide reference) {
  sums.l2 += x * x;
  if constexpr (mode != NormMode::kL2Only) sums.l1 += magnitude;
  if constexpr (mode == NormMode::kWithReference) {
    const Wide difference = x - reference;
    sums.distance += difference * difference;
    sums.inner += x * reference;
    sums.reference += reference * reference;
  }
}

CURVLAB_HD double keep_nan(double linf, double l1) { return l1 != l1 ? l1 : linf; }

CURVLAB_HD double max_keep_nan(double a, double b) { return a > b || a != a ? a : b; }

CURVLAB_HD bool is_computed(NormMode mode, int column) {
  if (mode == NormMode::kL2Only) return column == kL2;
  return mode == NormMode::kWithReference || column <= kNonzeros;
}

// From a column's sum to the value of `out`.
CURVLAB_HD double finish(NormMode mode, int column, double sum) {
  if (!is_computed(mode, column)) return static_cast<double>(NAN);
  return column == kL2 || column == kDistance || column == kReferenceL2 ? sqrt(sum) : sum;
}

}  // namespace curvlab::norms
