// SPDX-License-Identifier: Apache-2.0
// What orders memory between blocks, told to TSan: a write is seen by another block when a fence follows it, then an
// atomic of the writer's block; and there an atomic on the same address, then a fence before the read. An atomic alone
// orders nothing, and neither does a fence that comes after the writer's atomic. Within a block a fence counts for all
// threads ("every thread fences, barrier, thread 0 takes the ticket" is lawful, as __threadfence is fence.sc).
// Only TSan builds do anything here.
#pragma once
#include "block.h"

namespace simt {

// What the block's fences have covered so far is kept by a TSan fiber of its own, made at the first fence: what a
// thread does after its fence is not published by a later atomic.
SIMT_SWITCHES inline void exchange_with_fence_view(const void* acquire, const void* release) {
  tsan::switch_to(block.fence_view);
  if (acquire) tsan::acquire(acquire);
  if (release) tsan::release(release);
  tsan::switch_to(block.current->tsan);
}

inline void fence() {
  if constexpr (tsan::kEnabled) {
    tsan::Quiet quiet;
    for (const void* address : block.observed)
      if (address) tsan::acquire(address);
    if (!block.fence_view) block.fence_view = tsan::create();
    const void* own = &block.current->tsan;
    tsan::release(own);
    exchange_with_fence_view(own, nullptr);
  }
}

// Before every atomic on `address`.
inline void at_atomic(const void* address) {
  if constexpr (tsan::kEnabled) {
    tsan::Quiet quiet;
    if (block.fence_view) exchange_with_fence_view(nullptr, address);
    for (const void* seen : block.observed)
      if (seen == address) return;
    block.observed[block.next_observed++ % kObserved] = address;
  } else {
    (void)address;
  }
}

}  // namespace simt
