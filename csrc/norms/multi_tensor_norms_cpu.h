// SPDX-License-Identifier: Apache-2.0
// The vectorized CPU kernel of multi_tensor_norms (filter_norms runs its L2 part): sums over one chunk. Included by
// cpu_<isa>.cpp, once per instruction set.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "norms/cpu_kernels.h"
#include "norms/multi_tensor_norms.h"

namespace curvlab::norms {

template <>
struct Arithmetic<CURVLAB_CPU_CAPABILITY::FloatLanes> {
    using Narrow = CURVLAB_CPU_CAPABILITY::FloatLanes;
    using Wide = CURVLAB_CPU_CAPABILITY::DoubleLanes;
    using Count = CURVLAB_CPU_CAPABILITY::Int32Lanes;
    static CURVLAB_HD Wide widen(Narrow value) { return CURVLAB_CPU_CAPABILITY::widen_float(value); }
    static CURVLAB_HD Wide magnitude_of_wide(Wide value) { return CURVLAB_CPU_CAPABILITY::absolute(value); }
    static CURVLAB_HD Narrow max_magnitude(Narrow value, Narrow old) {
        return CURVLAB_CPU_CAPABILITY::larger(CURVLAB_CPU_CAPABILITY::absolute(value), old);
    }
    static CURVLAB_HD void count_nonzeros(Count& count, Narrow value) { count -= value != 0.0f; }
};

template <>
struct Arithmetic<CURVLAB_CPU_CAPABILITY::DoubleLanes> {
    using Wide = CURVLAB_CPU_CAPABILITY::DoubleLanes;
    using Count = CURVLAB_CPU_CAPABILITY::Int64Lanes;
    static CURVLAB_HD Wide widen(Wide value) { return value; }
    static CURVLAB_HD Wide magnitude_of_wide(Wide value) { return CURVLAB_CPU_CAPABILITY::absolute(value); }
    static CURVLAB_HD Wide max_magnitude(Wide value, Wide old) {
        return CURVLAB_CPU_CAPABILITY::larger(CURVLAB_CPU_CAPABILITY::absolute(value), old);
    }
    static CURVLAB_HD void count_nonzeros(Count& count, Wide value) { count -= value != 0.0; }
};

namespace CURVLAB_CPU_CAPABILITY {

using namespace curvlab::CURVLAB_CPU_CAPABILITY;

template <class scalar_t>
struct Lanes {  // float, and the 16-bit types held as float
    using Narrow = FloatLanes;
    using Count = Int32Lanes;
    static constexpr int kChain = 256;  // a whole chunk: float products are exact in double, 256 additions err 3e-14
};
template <>
struct Lanes<double> {
    using Narrow = DoubleLanes;
    using Count = Int64Lanes;
    static constexpr int kChain = 32;  // additions in a row, so that constant data keeps 1e-14
};

CURVLAB_INLINE FloatLanes load(const float* x) { return load_lanes<FloatLanes>(x); }
CURVLAB_INLINE DoubleLanes load(const double* x) { return load_lanes<DoubleLanes>(x); }
CURVLAB_INLINE FloatLanes load(const BFloat16Bits* x) { return widen_bfloat16(load_lanes<UInt16Lanes>(x)); }
CURVLAB_INLINE FloatLanes load(const Float16Bits* x) { return widen_float16(load_lanes<UInt16Lanes>(x)); }

template <class scalar_t>
using LaneSums = RunningSums<DoubleLanes, typename Lanes<scalar_t>::Narrow, typename Lanes<scalar_t>::Count>;

constexpr int kStep = 2 * kLanes;  // elements a step: two independent sets of running sums

template <class scalar_t, NormMode mode>
CURVLAB_INLINE void accumulate_step(LaneSums<scalar_t> (&sums)[2], const scalar_t* x, const scalar_t* reference) {
    typename Lanes<scalar_t>::Narrow references[2] = {};
    if constexpr (mode == NormMode::kWithReference) {
        references[0] = load(reference);
        references[1] = load(reference + kLanes);
    }
    accumulate<mode>(sums[0], load(x), references[0]);
    accumulate<mode>(sums[1], load(x + kLanes), references[1]);
}

// Moves the sums to `total`, so that the next ones start from zero.
template <class Sums>
CURVLAB_INLINE void flush(Sums& total, Sums (&sums)[2]) {
    total.l1 += sums[0].l1 + sums[1].l1;
    total.l2 += sums[0].l2 + sums[1].l2;
    total.distance += sums[0].distance + sums[1].distance;
    total.inner += sums[0].inner + sums[1].inner;
    total.reference += sums[0].reference + sums[1].reference;
    for (int i = 0; i < 2; ++i) {
        total.linf = larger(sums[i].linf, total.linf);
        total.nonzeros += sums[i].nonzeros;
        sums[i].clear();
    }
}

template <class Sums>
CURVLAB_INLINE void store(const Sums& total, ChunkRow* row) {
    double linf = 0.0, nonzeros = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) {
        linf = total.linf[lane] > linf ? total.linf[lane] : linf;
        nonzeros += static_cast<double>(total.nonzeros[lane]);
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
    LaneSums<scalar_t> total, sums[2];
    total.clear();
    sums[0].clear();
    sums[1].clear();
    std::int64_t i = 0;
    const std::int64_t whole = n - n % kStep;
    while (i < whole) {
        const std::int64_t chain = Lanes<scalar_t>::kChain * kStep;
        const std::int64_t end = i + chain < whole ? i + chain : whole;
        for (; i < end; i += kStep) accumulate_step<scalar_t, mode>(sums, x + i, reference + i);
        flush(total, sums);
    }
    if (i < n) {  // the rest, filled up with zeros: they add nothing to any column
        scalar_t rest[kStep] = {}, rest_reference[kStep] = {};
        memcpy(rest, x + i, static_cast<std::size_t>(n - i) * sizeof(scalar_t));
        if constexpr (mode == NormMode::kWithReference) {
            memcpy(rest_reference, reference + i, static_cast<std::size_t>(n - i) * sizeof(scalar_t));
        }
        accumulate_step<scalar_t, mode>(sums, rest, rest_reference);
        flush(total, sums);
    }
    store(total, row);
}

#define CURVLAB_NORM_CHUNKS(mode) \
    {sum_chunk<float, mode>, sum_chunk<double, mode>, sum_chunk<BFloat16Bits, mode>, sum_chunk<Float16Bits, mode>}
#define CURVLAB_NORM_KERNELS                                                                          \
    {                                                                                                 \
        {                                                                                             \
            CURVLAB_NORM_CHUNKS(NormMode::kNorms), CURVLAB_NORM_CHUNKS(NormMode::kWithReference),     \
                CURVLAB_NORM_CHUNKS(NormMode::kL2Only)                                                \
        }                                                                                             \
    }

}  // namespace CURVLAB_CPU_CAPABILITY
}  // namespace curvlab::norms
