// SPDX-License-Identifier: Apache-2.0
// What every family's <family>_binding.cpp has for ctypes: the harness' own controls, and launches that return their
// error. One binding a library: what is exported here is defined here.
#pragma once
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "simt_host.h"

#define CURVLAB_EXPORT extern "C" __attribute__((visibility("default")))

CURVLAB_EXPORT void host_set_order(int order, std::uint64_t seed) {
  simt::options = {static_cast<simt::Order>(order), seed};
}

// launches, blocks, threads, switches, barriers, warp operations since the last call
CURVLAB_EXPORT void host_take_statistics(std::uint64_t* six) {
  std::memcpy(six, &simt::statistics, sizeof simt::statistics);
  simt::statistics = {};
}

namespace {

// nullptr, or what went wrong, until the next call.
template <class F>
const char* guarded(F launch) {
  static std::string message;
  try {
    return launch();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// Device memory that nobody has written: NaN, or pointers to nowhere.
template <class T>
std::vector<T> garbage(std::int64_t n) {
  std::vector<T> v(static_cast<size_t>(n));
  if (n) std::memset(static_cast<void*>(v.data()), 0xFF, sizeof(T) * v.size());
  return v;
}

}  // namespace
