// SPDX-License-Identifier: Apache-2.0
// Atomics by CUDA's names. They are relaxed, as on the device: only a fence or a barrier orders other memory around
// them, and TSan sees the kernel that forgot it.
#pragma once
#include <type_traits>

#include "ordering.h"

namespace simt {
template <class T, class F>
T atomic_update(T* p, F next) {
  at_atomic(p);
  T old, updated;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do updated = next(old);
  while (!__atomic_compare_exchange(p, &old, &updated, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
using Same = std::type_identity_t<T>;  // the address alone decides the type; the value converts
}  // namespace simt

template <class T>
T atomicAdd(T* p, simt::Same<T> v) {
  return simt::atomic_update(p, [v](T old) { return T(old + v); });
}
template <class T>
T atomicSub(T* p, simt::Same<T> v) {
  return simt::atomic_update(p, [v](T old) { return T(old - v); });
}
template <class T>
T atomicMax(T* p, simt::Same<T> v) {
  return simt::atomic_update(p, [v](T old) { return old > v ? old : v; });
}
template <class T>
T atomicMin(T* p, simt::Same<T> v) {
  return simt::atomic_update(p, [v](T old) { return old < v ? old : v; });
}
template <class T>
T atomicAnd(T* p, simt::Same<T> v) {
  return simt::atomic_update(p, [v](T old) { return T(old & v); });
}
template <class T>
T atomicOr(T* p, simt::Same<T> v) {
  return simt::atomic_update(p, [v](T old) { return T(old | v); });
}
template <class T>
T atomicXor(T* p, simt::Same<T> v) {
  return simt::atomic_update(p, [v](T old) { return T(old ^ v); });
}
template <class T>
T atomicExch(T* p, simt::Same<T> v) {
  return simt::atomic_update(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, simt::Same<T> expected, simt::Same<T> v) {
  return simt::atomic_update(p, [expected, v](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::atomic_update(p, [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}
inline unsigned atomicDec(unsigned* p, unsigned limit) {
  return simt::atomic_update(p, [limit](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}
