// SPDX-License-Identifier: Apache-2.0
// The pybind11 module _host: build facts and host-side objects.
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

#include "hvp/bindings.h"

namespace py = pybind11;

namespace curvlab {
namespace {

template <class Function>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

std::string cpu_capability() {
  static const auto op = find_op<std::string()>("curvlab::cpu_capability");
  return op.call();
}

// Lists of parameters that are measured again and again: they are handed to the op as C++ lists, which saves taking a
// Python list apart (100 tensors: most of the call). The op reads addresses and sizes anew each time, so a parameter
// may move (`p.data = ...`, `load_state_dict(assign=False)`).
class NormTable {
 public:
  NormTable(std::vector<at::Tensor> tensors, std::vector<at::Tensor> reference)
      : tensors_(std::move(tensors)), reference_(std::move(reference)) {
    call(false);  // an unfit list is refused here, not at the first use
  }

  at::Tensor call(bool l2_only) const {
    static const auto op = find_op<at::Tensor(at::TensorList, at::TensorList, bool)>("curvlab::multi_tensor_norms");
    return op.call(tensors_, l2_only ? at::TensorList() : at::TensorList(reference_), l2_only);
  }

  const std::vector<at::Tensor>& tensors() const { return tensors_; }
  const std::vector<at::Tensor>& reference() const { return reference_; }

 private:
  std::vector<at::Tensor> tensors_, reference_;
};

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side objects of curvlab and facts about its build.";
  m.def("build_facts", [] { return std::string(CURVLAB_BUILD_FACTS); }, "JSON: what this build was made with.");
  m.def("cpu_capability", &cpu_capability, "Instruction set whose CPU kernels run: default, avx2 or avx512.");
  py::class_<NormTable>(m, "NormTable", "Tensors prepared for repeated calls of multi_tensor_norms.")
      .def(py::init<std::vector<at::Tensor>, std::vector<at::Tensor>>(), py::arg("tensors"), py::arg("reference"))
      .def("__call__", &NormTable::call, py::arg("l2_only") = false, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("tensors", &NormTable::tensors)
      .def_property_readonly("reference", &NormTable::reference);
  hvp::bind(m);
}

}  // namespace curvlab
