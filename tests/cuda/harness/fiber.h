// SPDX-License-Identifier: Apache-2.0
// Stacks and the switch between them. x86-64 on ELF systems has its own 16-instruction switch (swapcontext makes a
// system call each time, about 20 times slower); macOS, aarch64 and the rest use ucontext.
#pragma once
#if defined(__APPLE__) && !defined(_XOPEN_SOURCE)
#define _XOPEN_SOURCE 700  // macOS hides ucontext without it
#endif
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>
#include <vector>

#include "sanitizers.h"

#if defined(__x86_64__) && defined(__ELF__) && !defined(SIMT_FORCE_UCONTEXT)
#define SIMT_ASM_SWITCH 1
#else
#include <ucontext.h>
#endif
#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif
#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif

#ifdef SIMT_ASM_SWITCH
extern "C" void simt_switch_stack(void** save_sp, void* next_sp);
// Saves what the ABI lets a callee rely on, and goes on where the other stack left off.
asm(R"(
.pushsection .text.simt_switch_stack,"axG",@progbits,simt_switch_stack,comdat
.weak simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
.popsection
)");
#endif

namespace simt {

class Context {
 public:
#ifdef SIMT_ASM_SWITCH
  // `stagger` moves the tops of neighboring stacks to different cache sets: equal ones make every switch miss.
  void prepare(char* stack, size_t bytes, unsigned stagger, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes - (stagger % 64) * 128) - 2;
    top[0] = reinterpret_cast<void*>(entry);  // once this is popped, rsp % 16 == 8, as after a call
    top[1] = nullptr;
    sp_ = top - 6;  // the six saved registers, whatever they hold
  }
  static void swap(Context& from, Context& to) { simt_switch_stack(&from.sp_, to.sp_); }

 private:
  void* sp_ = nullptr;
#else
  void prepare(char* stack, size_t bytes, unsigned, void (*entry)()) {
    getcontext(&uc_);
    uc_.uc_stack.ss_sp = stack;
    uc_.uc_stack.ss_size = bytes;
    uc_.uc_link = nullptr;
    makecontext(&uc_, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.uc_, &to.uc_); }

 private:
  ucontext_t uc_;
#endif
};

// Stacks are kept for the next launch. The lowest page of each is a guard: an overflow stops at once.
class StackPool {
 public:
  static constexpr size_t kBytes = 256 * 1024;  // a 32 KB kernel parameter and a deep call still fit

  char* at(size_t i) {
    while (stacks_.size() <= i) stacks_.push_back(make());
    return stacks_[i];
  }
  void forget_poison() {  // fibers that were left in the middle of a kernel leave ASan marks behind
    for (char* s : stacks_) asan::unpoison(s, kBytes);
  }

 private:
  static char* make() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, kBytes + page, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED || mprotect(p, page, PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<char*>(p) + page;
  }
  std::vector<char*> stacks_;
};

}  // namespace simt
