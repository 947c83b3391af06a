// SPDX-License-Identifier: Apache-2.0
// Every op of curvlab, one line each with its formula: the table of contents. The folders hold the implementations.
#include <torch/library.h>

#include "common/python_module.h"

TORCH_LIBRARY(curvlab, m) {
  // norms/: [T + 1, 7] per tensor and global: sum|x|, |x|_2, max|x|, #{x != 0}, |x - r|_2, <x, r>, |r|_2
  m.def("multi_tensor_norms(Tensor[] tensors, Tensor[] reference, bool l2_only=False) -> Tensor");
  // norms/: |w[j]|_2 of every slice along the first dimension, the tensors one after another
  m.def("filter_norms(Tensor[] tensors) -> Tensor");
  // common/: the instruction set whose CPU kernels run
  m.def("cpu_capability() -> str");
}

CURVLAB_PYTHON_MODULE(_C)
