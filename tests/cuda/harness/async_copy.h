// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies to shared memory. CUDA may make a copy at any moment from its issue to the wait that covers it.
// Forward order takes the last one: a kernel that reads before its wait sees what was there before (NaN in fresh shared
// memory), and what no wait covers never arrives. Reverse order takes the first: what others still read is overwritten.
// Random order takes the one or the other.
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

inline bool copies_at_once() {
  static Random random(options.seed);
  return options.order == Order::reverse || (options.order == Order::random && random.below(2));
}

inline void copy_async(void* to, const void* from, unsigned bytes) {
  AsyncCopy copy{to, from, bytes, 0};
  {
    tsan::Quiet quiet;
    if (!copies_at_once()) {
      AsyncQueue& queue = own_async_queue();
      if (queue.count == AsyncQueue::kMost) block.fail("more than 1024 asynchronous copies of a thread wait");
      copy.group = queue.committed;
      queue.waiting[queue.count++] = copy;
      return;
    }
  }
  make_copy(copy);
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
