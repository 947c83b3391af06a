// SPDX-License-Identifier: Apache-2.0
// CUDA's words for functions and variables, as an ordinary C++20 compiler understands them.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __managed__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// A plain __shared__ array would be one static array for all blocks: unpoisoned, unguarded, and invisible to the
// checks between blocks. So it does not compile here, and the error says what to write.
#define __shared__ write_CURVLAB_SHARED_or_CURVLAB_DYN_SHARED_instead_of___shared__
