// SPDX-License-Identifier: Apache-2.0
// CURVLAB_HD marks arithmetic that the CPU kernels, the CUDA kernels and the tests compile from one source.
#pragma once

#if defined(__CUDACC__)
#define CURVLAB_HD __host__ __device__ __forceinline__
#else
#define CURVLAB_HD inline __attribute__((always_inline))
#endif
