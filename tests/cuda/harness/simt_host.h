// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU: the kernels' own source, compiled by an ordinary C++20 compiler with
// -DCURVLAB_SIMT_HOST, one fiber per CUDA thread. csrc/common/device.cuh includes this file in place of CUDA's headers.
//
//   fiber.h            stacks and the switch between them
//   block.h            threads of one block, order of execution, __syncthreads
//   warp.h             shuffles, votes, __syncwarp, fences
//   ordering.h         what fences and atomics order between blocks
//   shared_memory.h    poisoned and guarded arrays, fresh for every block
//   launch.h           the grid; launch configuration errors
//   async_copy.h       copies to shared memory that arrive at once or at their wait
//   atomics.h device_math.h vector_types.h runtime_api.h qualifiers.h     CUDA's words
//   sanitizers.h       what ASan and TSan are told
//
// Finds: wrong results under forward, reverse and random order, a barrier that not all threads reach, warp operations
// whose mask is wrong, reads of unwritten shared memory (NaN); with ASan and UBSan accesses out of bounds and
// misaligned; with TSan races within and between blocks.
// Limits: blocks run one after another, so a block that waits for a later one hangs; no cooperative groups, textures,
// tensor cores; relaxed atomics are stronger here than on a device; rounding is the host's.
#pragma once
#include "vector_types.h"
// clang-format off
#include "launch.h"
#include "warp.h"
#include "atomics.h"
#include "async_copy.h"
#include "device_math.h"
#include "qualifiers.h"  // last: the standard library's headers must not see these macros
// clang-format on

#ifdef CURVLAB_SHARED
#error \
    "simt_host.h defines CURVLAB_SHARED, CURVLAB_DYN_SHARED and CURVLAB_LAUNCH: include it before any other definition"
#endif
// A static array: CURVLAB_SHARED(float, tile, [32][33]). Known by the address of a constant of its own.
#define CURVLAB_SHARED(T, name, dims)                                      \
  static const char simt_key_of_##name = 0;                                \
  using simt_type_of_##name = T dims;                                      \
  simt_type_of_##name& name = *static_cast<simt_type_of_##name*>(          \
      simt::shared_array(&simt_key_of_##name, sizeof(simt_type_of_##name), \
                         alignof(simt_type_of_##name) < 16 ? 16 : alignof(simt_type_of_##name)))
// The array whose size the launch gives.
#define CURVLAB_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::block.memory->dynamic())
#define CURVLAB_LAUNCH(kernel, grid, block_, smem, stream, ...) \
  simt::launch(kernel, dim3(grid), dim3(block_), smem, stream __VA_OPT__(, ) __VA_ARGS__)
