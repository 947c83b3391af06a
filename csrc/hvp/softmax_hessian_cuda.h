// SPDX-License-Identifier: Apache-2.0
// Launcher of softmax_hessian_product on CUDA: raw pointers and a stream, no torch and no CUDA header.
#pragma once

#include "hvp/softmax_hessian.h"

namespace curvlab::hvp {

// One launch on `stream` (a cudaStream_t), none without an element. Returns nullptr, or CUDA's words.
const char* launch_softmax_hessian(const SoftmaxArguments& arguments, int multiprocessors, void* stream);

}  // namespace curvlab::hvp
