// SPDX-License-Identifier: Apache-2.0
// The only header through which kernels see CUDA. nvcc compiles them for the device; with CURVLAB_SIMT_HOST defined,
// an ordinary C++ compiler compiles the same source against the test harness ("simt_host.h", found by -I), which
// defines the same macros, qualifiers and builtins and runs one fiber per CUDA thread.
#pragma once

#include "common/hd.h"

#if defined(CURVLAB_SIMT_HOST)

#include "simt_host.h"

#ifndef __grid_constant__
#define __grid_constant__
#endif

#elif defined(__CUDACC__)

#include <cuda_runtime.h>

// Static shared memory: CURVLAB_SHARED(double, tile, [8][7]); the harness guards the array and gives a fresh one to
// every block.
#define CURVLAB_SHARED(T, name, dims) __shared__ T name dims

// Dynamic shared memory of the launch, seen as T*.
#define CURVLAB_DYN_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char curvlab_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(curvlab_dynamic_shared)

// Kernels with a comma in their template arguments go in parentheses: CURVLAB_LAUNCH((kernel<a, b>), ...).
#define CURVLAB_LAUNCH(kernel, grid, block, smem, stream, ...) (kernel)<<<grid, block, smem, stream>>>(__VA_ARGS__)

#else
#error "device.cuh: compile with nvcc, or with CURVLAB_SIMT_HOST and the test harness on the include path"
#endif
