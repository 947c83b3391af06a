// SPDX-License-Identifier: Apache-2.0
// Launchers of pool_gather and pool_scatter on CUDA: raw pointers and a stream, no torch and no CUDA header.
#pragma once

#include "hvp/pool.h"

namespace curvlab::hvp {

// On `stream` (a cudaStream_t): no synchronization, no allocation, capturable in a graph. Without an output element
// nothing is launched. Return nullptr, or CUDA's words.
const char* launch_pool_gather(const PoolArguments& pool, void* stream);
// scratch: directions * samples * size * channels floats for bfloat16 windows that may overlap, else null.
const char* launch_pool_scatter(const PoolArguments& pool, float* scratch, int multiprocessors, void* stream);

}  // namespace curvlab::hvp
