// SPDX-License-Identifier: Apache-2.0
// Which build of the CPU kernels runs: one source is compiled per instruction set (cpu_<isa>.cpp) into a table of
// function pointers, and the choice is made at run time.
#pragma once

namespace curvlab {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

// The best that this CPU and this build have, or what the environment variable CURVLAB_CPU_CAPABILITY
// (default | avx2 | avx512) asks for. Throws on another value, or on one that the CPU lacks.
CpuCapability cpu_capability();

const char* name(CpuCapability capability);

}  // namespace curvlab
