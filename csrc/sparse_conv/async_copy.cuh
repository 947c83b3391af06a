// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that go on while the thread computes (cp.async, compute capability 8.0 on). A
// thread's copies since its last commit are a group; what a group brought is seen by the thread after the wait, by
// others after a barrier that follows it. The harness of the tests makes them at the first and the last moment allowed.
#pragma once

#include "common/device.cuh"

namespace curvlab {

// 4 or 8 bytes, aligned to their size.
template <class T>
__device__ __forceinline__ void copy_async(T* shared, const T* global) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if defined(CURVLAB_SIMT_HOST)
  simt::copy_async(shared, global, sizeof(T));
#else
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global), "n"(sizeof(T))
      : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#if defined(CURVLAB_SIMT_HOST)
  simt::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last `pending` groups have arrived.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
#if defined(CURVLAB_SIMT_HOST)
  simt::wait_for_copies(pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace curvlab
