// SPDX-License-Identifier: Apache-2.0
// What AddressSanitizer and ThreadSanitizer must be told when a program switches stacks by itself.
// Without a sanitizer every function here is empty.
#pragma once
#include <cstddef>

#if defined(__has_feature)
#define SIMT_HAS_FEATURE(x) __has_feature(x)
#else
#define SIMT_HAS_FEATURE(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || SIMT_HAS_FEATURE(address_sanitizer)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__) || SIMT_HAS_FEATURE(thread_sanitizer)
#define SIMT_TSAN 1
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// TSan keeps a call stack per fiber: a function that switches must not be instrumented, or entry and exit would be
// noted on different stacks.
#define SIMT_SWITCHES __attribute__((noinline, no_sanitize("thread")))

namespace simt::tsan {
#ifdef SIMT_TSAN
inline constexpr bool kEnabled = true;
inline void* current() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(1); }
inline void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
// Flag 1: the switch itself orders nothing, so only barriers, fences and atomics of the kernel do.
SIMT_SWITCHES inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
inline void release(const void* p) { __tsan_release(const_cast<void*>(p)); }
inline void acquire(const void* p) { __tsan_acquire(const_cast<void*>(p)); }
// The harness's own bookkeeping is not the kernel's: keep it out of race reports.
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};
#else
inline constexpr bool kEnabled = false;
inline void* current() { return nullptr; }
inline void* create() { return nullptr; }
inline void destroy(void*) {}
inline void switch_to(void*) {}
inline void release(const void*) {}
inline void acquire(const void*) {}
struct Quiet {
  Quiet() {}
  ~Quiet() {}
};
#endif
}  // namespace simt::tsan

namespace simt::asan {
#ifdef SIMT_ASAN
inline constexpr bool kEnabled = true;
inline void start_switch(void** fake_stack, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
}
inline void finish_switch(void* fake_stack, const void** bottom, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, bottom, bytes);
}
inline void poison(void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
inline constexpr bool kEnabled = false;
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif
}  // namespace simt::asan
