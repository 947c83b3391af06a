// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels that each instruction set fills (cpu_<isa>.cpp) and that the ops choose from.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "sparse_conv/strip.h"

namespace curvlab::sparse_conv {

// What a strip is of: images that share registers, and tile rows [t, t + tile_rows) of their blocks; where strips are
// fewer than threads, only one of `parts` ranges of destination channels.
struct StripTask {
  std::int64_t first_image, images;
  std::int64_t t, tile_rows;
  std::int64_t part, parts;
  bool follows;  // the scratch still holds the strip above
  bool last;     // of its images' strips
};

// What all strips of a call share. Sizes of scratch in elements.
struct StripWork {
  LaneGrid grid;
  PlaneView x, grad;
  StripLayout x_layout, grad_layout;
  const StripPass* pass;
  std::int64_t passes;
  std::int64_t acc_size, grad_size;
};

struct CpuKernels {       // [float32, float64]
  std::int64_t lanes[2];  // of a register
  bool fast_blocks[2];    // blocks of planes are packed and unpacked as fast as images
  std::int64_t tile;      // vectors of results in registers
  void (*forward[2])(const StripTask&, const StripWork&, void* scratch);
  void (*backward[2])(const StripTask&, const StripWork&, const StripDot*, void* scratch);
};

extern const CpuKernels kCpuKernelsDefault;
extern const CpuKernels kCpuKernelsAvx2;  // where MULTI_ISA is defined
extern const CpuKernels kCpuKernelsAvx512;

inline const CpuKernels& cpu_kernels() {
#if defined(MULTI_ISA)
  switch (cpu_capability()) {
    case CpuCapability::kAvx512:
      return kCpuKernelsAvx512;
    case CpuCapability::kAvx2:
      return kCpuKernelsAvx2;
    default:
      break;
  }
#else
  (void)cpu_capability();  // refuses a setting that this build lacks
#endif
  return kCpuKernelsDefault;
}

}  // namespace curvlab::sparse_conv
