// SPDX-License-Identifier: Apache-2.0
// Launcher of activation_factors on CUDA: raw pointers and a stream, no torch and no CUDA header.
#pragma once

#include "hvp/activation_factors.h"

namespace curvlab::hvp {

// One launch on `stream` (a cudaStream_t), none without an element. Returns nullptr, or CUDA's words.
const char* launch_activation_factors(const ActivationArguments& arguments, int multiprocessors, void* stream);

}  // namespace curvlab::hvp
