// SPDX-License-Identifier: Apache-2.0
// Shared memory of one block: every array of every block starts as 0xFF bytes (NaN for floats, -1 for integers), lies
// alone between bytes that ASan guards, and under TSan is not used again within the launch, so that two blocks are
// never taken for one.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "sanitizers.h"

namespace simt {

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<unsigned char, FreeDeleter>;

inline Bytes aligned_bytes(size_t alignment, size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, alignment, bytes) != 0) throw std::bad_alloc();
  return Bytes(static_cast<unsigned char*>(p));
}

// Addresses by which a block's barriers are known to TSan. Two of each: a fast thread's next barrier must not be taken
// for the one that a slow thread is still leaving.
struct SyncObjects {
  uint64_t barrier[2];
  uint64_t warp[32][2];
};

class SharedMemory {
 public:
  static constexpr size_t kStaticLimit = 48 * 1024;
  static constexpr size_t kGuard = 64;

  explicit SharedMemory(size_t dynamic_bytes) : arena_(aligned_bytes(128, kArenaBytes)), sync(new SyncObjects{}) {
    std::memset(arena_.get(), 0xFF, kArenaBytes);
    asan::poison(arena_.get(), kArenaBytes);
    if (dynamic_bytes) {
      dynamic_ = aligned_bytes(128, dynamic_bytes);  // its own allocation: ASan guards both ends to the byte
      std::memset(dynamic_.get(), 0xFF, dynamic_bytes);
    }
  }
  ~SharedMemory() {
    if (arena_) asan::unpoison(arena_.get(), kArenaBytes);
  }
  SharedMemory(SharedMemory&&) = default;

  unsigned char* dynamic() const { return dynamic_.get(); }

  // The array that a CURVLAB_SHARED line names by `key`; nullptr when the block's static arrays exceed 48 KiB.
  void* array(const void* key, size_t bytes, size_t alignment) {
    for (const Slot& s : slots_)
      if (s.key == key) return s.address;
    const size_t start = (used_ + alignment - 1) / alignment * alignment;
    declared_ += bytes;
    if (declared_ > kStaticLimit || start + bytes + kGuard > kArenaBytes) return nullptr;
    unsigned char* p = arena_.get() + start;
    asan::unpoison(p, bytes);
    used_ = start + (bytes + 7) / 8 * 8 + kGuard;
    slots_.push_back({key, p});
    return p;
  }

 private:
  struct Slot {
    const void* key;
    void* address;
  };
  static constexpr size_t kArenaBytes = kStaticLimit + 64 * (128 + kGuard);  // room for 64 arrays and their guards
  Bytes arena_, dynamic_;
  std::vector<Slot> slots_;
  size_t used_ = 0, declared_ = 0;

 public:
  std::unique_ptr<SyncObjects> sync;
};

}  // namespace simt
