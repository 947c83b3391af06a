// SPDX-License-Identifier: Apache-2.0
// The module _C_cuda: the CUDA registrations of every family (*_cuda.cpp).
#include "common/python_module.h"

CURVLAB_PYTHON_MODULE(_C_cuda)
