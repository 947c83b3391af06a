// SPDX-License-Identifier: Apache-2.0
// Makes a library of registrations importable (`import curvlab._C`): loading it is what registers.
#pragma once

#include <Python.h>

#define CURVLAB_PYTHON_MODULE(name)                                                              \
  PyMODINIT_FUNC PyInit_##name(void) {                                                           \
    static PyModuleDef module = {                                                                \
        PyModuleDef_HEAD_INIT, #name, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&module);                                                             \
  }
