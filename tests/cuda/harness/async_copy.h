// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies to shared memory. A copy is made at the wait that covers it, the latest moment that CUDA allows:
// a kernel that reads before its wait sees what was there before (NaN in fresh shared memory). What no wait covers
// never arrives.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "block.h"

namespace simt {

struct AsyncCopy {
  void* to;
  const void* from;
  unsigned bytes, group;
};

// Of one thread. Room for all copies is made by the host, before a block runs: what a fiber allocates TSan would hold
// against the host.
struct AsyncQueue {
  static constexpr unsigned kMost = 1024;
  AsyncCopy waiting[kMost];
  unsigned count = 0, committed = 0;
};

inline std::vector<AsyncQueue>& async_queues = *new std::vector<AsyncQueue>(1024);  // a block has no more threads

inline AsyncQueue& own_async_queue() {
  AsyncQueue& queue = async_queues[block.current->linear];
  if (block.current->async_block != block.serial) {  // first use in this block
    queue.count = queue.committed = 0;
    block.current->async_block = block.serial;
  }
  return queue;
}

inline void copy_async(void* to, const void* from, unsigned bytes) {
  tsan::Quiet quiet;
  AsyncQueue& queue = own_async_queue();
  if (queue.count == AsyncQueue::kMost) block.fail("more than 1024 asynchronous copies of a thread wait");
  queue.waiting[queue.count++] = {to, from, bytes, queue.committed};
}

inline void commit_copies() {
  tsan::Quiet quiet;
  ++own_async_queue().committed;
}

// The access itself is the kernel's, so it is not kept from the sanitizers.
inline void make_copy(const AsyncCopy& copy) {
  if (copy.bytes == 4) {
    *static_cast<uint32_t*>(copy.to) = *static_cast<const uint32_t*>(copy.from);
  } else {
    *static_cast<uint64_t*>(copy.to) = *static_cast<const uint64_t*>(copy.from);
  }
}

inline void wait_for_copies(unsigned pending) {
  AsyncQueue* queue = nullptr;
  unsigned covered = 0;
  {
    tsan::Quiet quiet;
    queue = &own_async_queue();
    while (covered < queue->count && queue->waiting[covered].group + pending < queue->committed) ++covered;
  }
  for (unsigned i = 0; i < covered; ++i) {
    AsyncCopy copy{};
    {
      tsan::Quiet quiet;
      copy = queue->waiting[i];
    }
    make_copy(copy);
  }
  tsan::Quiet quiet;
  queue->count -= covered;
  std::memmove(queue->waiting, queue->waiting + covered, queue->count * sizeof(AsyncCopy));
}

}  // namespace simt
