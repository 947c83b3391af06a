// SPDX-License-Identifier: Apache-2.0
// Checks that teach: "op: argument[i] must be expected, got found". TypeError for what a tensor is, ValueError for what
// it holds or how it fits the others.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <ostream>
#include <string>

namespace curvlab {

// Where an argument stands, for messages.
struct Argument {
  const char* op;
  const char* name;
  std::size_t index;
};

inline std::ostream& operator<<(std::ostream& out, const Argument& argument) {
  return out << argument.op << ": " << argument.name << "[" << argument.index << "]";
}

inline bool is_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// Python's name of a dtype: float32, not Float.
inline std::string dtype_name(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

// A dense tensor of one of the four floating types.
inline void check_floating(const Argument& argument, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), argument, " must be a tensor, got None");
  TORCH_CHECK_TYPE(is_floating(tensor.scalar_type()), argument, " must be float32, float64, bfloat16 or float16, got ",
                   dtype_name(tensor.scalar_type()));
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, argument, " must be a dense (strided) tensor, got layout ",
                   tensor.layout());
}

inline void check_same_device(const Argument& argument, const at::Tensor& tensor, const at::Tensor& first) {
  TORCH_CHECK_VALUE(tensor.device() == first.device(), argument, " must be on ", first.device(),
                    " like tensors[0], got ", tensor.device(), ": lists over several devices are refused");
}

// For the kernel of last resort: only a list without tensors may come here.
inline void check_no_kernel(const char* op, at::TensorList tensors) {
  for (std::size_t i = 0; i < tensors.size(); ++i) check_floating({op, "tensors", i}, tensors[i]);
  TORCH_CHECK_NOT_IMPLEMENTED(tensors.empty(), op, ": no kernel for tensors on ", tensors[0].device(),
                              " is loaded (curvlab has CPU kernels, and CUDA kernels if built for them: see "
                              "`python -m curvlab`)");
}

}  // namespace curvlab
