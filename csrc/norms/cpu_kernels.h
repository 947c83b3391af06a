// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels that each instruction set fills (cpu_<isa>.cpp) and that multi_tensor_norms.cpp and
// filter_norms.cpp choose from.
#pragma once

#include <cstdint>

#include "common/cpu_kernels.h"
#include "norms/multi_tensor_norms.h"

namespace curvlab::norms {

constexpr std::int64_t kCpuChunkElements = 4096;

constexpr int kRowColumns = 8;  // kColumns and one that stays 0

// Row of partial sums of one chunk. No alignas: c10::SmallVector aligns its heap memory to 16 bytes only.
struct ChunkRow {
  double values[8];
  double operator()(int column) const { return values[column]; }
};

struct CpuKernels {
  // Sums over n <= kCpuChunkElements elements; columns that the mode leaves out are 0.
  void (*sum_chunk[3][4])(const void* x, const void* reference, std::int64_t n, ChunkRow* row);  // [mode][type]
};

extern const CpuKernels kCpuKernelsDefault;
extern const CpuKernels kCpuKernelsAvx2;  // where MULTI_ISA is defined
extern const CpuKernels kCpuKernelsAvx512;

inline const CpuKernels& cpu_kernels() {
  return choose_cpu_kernels<kCpuKernelsDefault, kCpuKernelsAvx2, kCpuKernelsAvx512>();
}

}  // namespace curvlab::norms
