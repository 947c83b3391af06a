// SPDX-License-Identifier: Apache-2.0
// The vectorized CPU kernel of multi_tensor_norms (filter_norms runs its L2 part): sums over one chunk. Included by
// cpu_<isa>.cpp, once per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/simd.h"
#include "norms/cpu_kernels.h"
#include "norms/multi_tensor_norms.h"

namespace curvlab::norms {

namespace CURVLAB_CPU_CAPABILITY {

using namespace curvlab::CURVLAB_CPU_CAPABILITY;

constexpr int kStep = 2 * kLanes;  // elements a step: two independent sets of running sums
constexpr std::int64_t kPrefetchBytes =
    2048;  // ahead; 6.3 -> 4.4 ms without, 9.0 -> 6.7 ms with a reference (11 M floats)

// What linf and nonzeros are taken from: whole registers of floats, or what the conversion to float leaves.
template <class scalar_t>
struct Held {
  using Narrow = FloatLanes;
  using Count = Int32Lanes;
  static constexpr int kChain = 256;  // a whole chunk: float products are exact in double, 256 additions err 3e-14
};
template <>
struct Held<float> {
  using Narrow = FullFloatLanes;
  using Count = FullInt32Lanes;
  static constexpr int kChain = 256;
};
template <>
struct Held<double> {
  using Narrow = DoubleLanes;
  using Count = Int64Lanes;
  static constexpr int kChain = 32;  // worst constant errs 9e-16; 256 in a row would take 7e-15 of the 1e-14
};

template <class scalar_t>
struct LaneSums {
  RunningSums<DoubleLanes> sums[2];
  typename Held<scalar_t>::Narrow linf;
  typename Held<scalar_t>::Count nonzeros;
};

CURVLAB_INLINE FloatLanes load(const float* x) { return load_lanes<FloatLanes>(x); }
CURVLAB_INLINE DoubleLanes load(const double* x) { return load_lanes<DoubleLanes>(x); }
CURVLAB_INLINE FloatLanes load(const BFloat16Bits* x) { return widen_bfloat16(load_lanes<UInt16Lanes>(x)); }
CURVLAB_INLINE FloatLanes load(const Float16Bits* x) { return widen_float16(load_lanes<UInt16Lanes>(x)); }

CURVLAB_INLINE DoubleLanes widen(FloatLanes lanes) { return widen_float(lanes); }
CURVLAB_INLINE DoubleLanes widen(DoubleLanes lanes) { return lanes; }

// Through an integer: the address may lie behind the tensor, which a prefetch forgives and pointer arithmetic does not.
CURVLAB_INLINE void prefetch_ahead(const void* pointer) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(pointer) + kPrefetchBytes));
}

template <class Narrow, class Count>
CURVLAB_INLINE void accumulate_narrow(Narrow& linf, Count& nonzeros, Narrow x) {
  linf = larger(absolute(x), linf);
  nonzeros -= x != Narrow{};  // a true comparison is -1
}

template <class scalar_t, NormMode mode>
CURVLAB_INLINE void accumulate_step(LaneSums<scalar_t>& total, const scalar_t* x, const scalar_t* reference) {
  for (int half = 0; half < 2; ++half) {
    const auto narrow = load(x + half * kLanes);
    const DoubleLanes wide = widen(narrow);
    DoubleLanes wide_reference{};
    if constexpr (mode == NormMode::kWithReference) wide_reference = widen(load(reference + half * kLanes));
    accumulate<mode>(total.sums[half], wide, absolute(wide), wide_reference);
    if constexpr (mode != NormMode::kL2Only && !std::is_same_v<scalar_t, float>) {
      accumulate_narrow(total.linf, total.nonzeros, narrow);
    }
  }
  if constexpr (mode != NormMode::kL2Only && std::is_same_v<scalar_t, float>) {
    accumulate_narrow(total.linf, total.nonzeros, load_lanes<FullFloatLanes>(x));
  }
}

// Moves the running sums to `total`, so that the next ones start from zero.
CURVLAB_INLINE void flush(RunningSums<DoubleLanes>& total, RunningSums<DoubleLanes> (&sums)[2]) {
  total.l1 += sums[0].l1 + sums[1].l1;
  total.l2 += sums[0].l2 + sums[1].l2;
  total.distance += sums[0].distance + sums[1].distance;
  total.inner += sums[0].inner + sums[1].inner;
  total.reference += sums[0].reference + sums[1].reference;
  sums[0].clear();
  sums[1].clear();
}

template <class scalar_t>
CURVLAB_INLINE void store(const RunningSums<DoubleLanes>& total, const LaneSums<scalar_t>& lanes, ChunkRow* row) {
  double linf = 0.0, nonzeros = 0.0;
  for (std::size_t lane = 0; lane < sizeof lanes.linf / sizeof lanes.linf[0]; ++lane) {
    linf = lanes.linf[lane] > linf ? lanes.linf[lane] : linf;
    nonzeros += static_cast<double>(lanes.nonzeros[lane]);
  }
  const double l1 = sum_lanes(total.l1);
  row->values[kL1] = l1;
  row->values[kL2] = sum_lanes(total.l2);
  row->values[kLinf] = keep_nan(linf, l1);
  row->values[kNonzeros] = nonzeros;
  row->values[kDistance] = sum_lanes(total.distance);
  row->values[kInner] = sum_lanes(total.inner);
  row->values[kReferenceL2] = sum_lanes(total.reference);
}

template <class scalar_t, NormMode mode>
static void sum_chunk(const void* x_data, const void* reference_data, std::int64_t n, ChunkRow* row) {
  const scalar_t* x = static_cast<const scalar_t*>(x_data);
  const scalar_t* reference = static_cast<const scalar_t*>(reference_data);
  RunningSums<DoubleLanes> total;
  LaneSums<scalar_t> lanes;
  total.clear();
  lanes.sums[0].clear();
  lanes.sums[1].clear();
  lanes.linf = typename Held<scalar_t>::Narrow{};
  lanes.nonzeros = typename Held<scalar_t>::Count{};
  std::int64_t i = 0;
  const std::int64_t whole = n - n % kStep;
  while (i < whole) {
    const std::int64_t chain = Held<scalar_t>::kChain * kStep;
    const std::int64_t end = i + chain < whole ? i + chain : whole;
    for (; i < end; i += kStep) {
      prefetch_ahead(x + i);
      if constexpr (mode == NormMode::kWithReference) prefetch_ahead(reference + i);
      accumulate_step<scalar_t, mode>(lanes, x + i, mode == NormMode::kWithReference ? reference + i : nullptr);
    }
    flush(total, lanes.sums);
  }
  if (i < n) {  // the rest, filled up with zeros: they add nothing to any column
    scalar_t rest[kStep] = {}, rest_reference[kStep] = {};
    memcpy(rest, x + i, static_cast<std::size_t>(n - i) * sizeof(scalar_t));
    if constexpr (mode == NormMode::kWithReference) {
      memcpy(rest_reference, reference + i, static_cast<std::size_t>(n - i) * sizeof(scalar_t));
    }
    accumulate_step<scalar_t, mode>(lanes, rest, rest_reference);
    flush(total, lanes.sums);
  }
  store(total, lanes, row);
}

#define CURVLAB_NORM_CHUNKS(mode) \
  {sum_chunk<float, mode>, sum_chunk<double, mode>, sum_chunk<BFloat16Bits, mode>, sum_chunk<Float16Bits, mode>}
#define CURVLAB_NORM_KERNELS                                                                \
  {                                                                                         \
    {                                                                                       \
      CURVLAB_NORM_CHUNKS(NormMode::kNorms), CURVLAB_NORM_CHUNKS(NormMode::kWithReference), \
          CURVLAB_NORM_CHUNKS(NormMode::kL2Only)                                            \
    }                                                                                       \
  }

}  // namespace CURVLAB_CPU_CAPABILITY
}  // namespace curvlab::norms
