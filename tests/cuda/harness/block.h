// SPDX-License-Identifier: Apache-2.0
// One block in execution: a fiber per CUDA thread, the choice of who runs next, and __syncthreads.
// A fiber runs undisturbed until a barrier or a warp operation, so the order of fibers is the only nondeterminism;
// it is chosen (forward, reverse, random by seed), and a kernel that lacks a barrier answers differently.
#pragma once
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"
#include "vector_types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace simt {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order : int { forward = 0, reverse = 1, random = 2 };
struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;
};
struct Statistics {  // of the last launches; the caller resets
  uint64_t launches, blocks, threads, switches, barriers, warp_operations;
};
inline Options options;
inline Statistics statistics;

class Random {  // xorshift64*: small, and the same everywhere
 public:
  explicit Random(uint64_t seed) : x_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t below(uint64_t n) {
    x_ ^= x_ >> 12;
    x_ ^= x_ << 25;
    x_ ^= x_ >> 27;
    return ((x_ * 0x2545F4914F6CDD1Dull) >> 32) * n >> 32;
  }

 private:
  uint64_t x_;
};

struct Site {
  const char* operation = "";
  const char* file = "";
  int line = 0;
  std::string text() const { return std::string(operation) + " at " + file + ":" + std::to_string(line); }
};

enum class State : uint8_t { ready, at_barrier, at_warp, returned };

constexpr unsigned kObserved = 8;  // addresses of atomics that the block's next fences look back at

struct Thread {
  Context context;
  char* stack = nullptr;
  void* tsan = nullptr;  // TSan's fiber
  void* asan_fake = nullptr;
  unsigned linear = 0;
  uint3 index{};
  State state = State::ready;
  Site site;
  uint64_t async_block = 0;  // the block that its queue in async_copy.h belongs to
  unsigned lane() const { return linear & 31; }
  unsigned warp() const { return linear >> 5; }
};

// Lanes of one warp that meet under one mask. Two value buffers: the lanes of meeting n + 1 cannot all have arrived
// before every lane has left meeting n, so the parity of the generation keeps them apart.
struct Meeting {
  uint32_t mask = 0, arrived = 0, generation = 0, present[2] = {0, 0};
  const char* operation = "";
  uint64_t value[2][32];
};
constexpr size_t kMasks = 64;  // different masks that one warp may use in one launch
struct Warp {
  std::vector<Meeting> meetings;
  uint32_t alive = 0;
};

struct BarrierState {
  Site site;  // of the first thread that waits
  unsigned waiting = 0, generation = 0;
  int all = 1, any = 0, count = 0;
};
struct BarrierResult {
  int all, any, count;
};

class Block {
 public:
  // Set by the launch.
  void (*call)(const void*) = nullptr;  // runs the kernel function with its arguments
  const void* arguments = nullptr;
  SharedMemory* memory = nullptr;
  uint64_t launch_start = 0, launch_end = 0;  // sync objects for TSan

  // State of the running block.
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  BarrierState barrier_state;
  BarrierResult barrier_result{};
  Thread* current = nullptr;
  unsigned size = 0, live = 0;
  uint64_t serial = 0;         // of the running block, counted from 1
  void* fence_view = nullptr;  // see ordering.h
  const void* observed[kObserved] = {};
  unsigned next_observed = 0;
  std::string failure;

  // `stack(i)` gives thread i its stack; `tsan` fibers are made by the launch.
  template <class StackOf>
  void run(unsigned num_threads, Random& random, StackOf stack) {
    prepare(num_threads, stack);
    while (head_ < ready_.size() && failure.empty()) resume(threads[next(random)]);
    if (failure.empty() && live) failure = stuck();
  }

  void wake(Thread& t) {
    t.state = State::ready;
    ready_.push_back(t.linear);
  }

  // Leave the current fiber; returns when the scheduler picks it again.
  SIMT_SWITCHES void park(bool for_good = false) {
    Thread* me = current;
    ++statistics.switches;
    asan::start_switch(for_good ? nullptr : &me->asan_fake, host_stack_, host_stack_bytes_);
    tsan::switch_to(host_tsan_);
    Context::swap(me->context, host_);
    asan::finish_switch(me->asan_fake, &host_stack_, &host_stack_bytes_);
  }

  [[noreturn]] void fail(const std::string& what) {  // from inside a fiber: the launch stops, the fiber stays
    if (failure.empty()) failure = what + " [" + where_am_i() + "]";
    for (;;) park();
  }

  void barrier(int predicate, const char* operation, const char* file, int line) {
    tsan::Quiet quiet;
    Thread& me = *current;
    me.site = {operation, file, line};
    BarrierState& b = barrier_state;
    if (live != size)
      fail(me.site.text() + ": " + std::to_string(size - live) + " thread(s) of the block have already returned");
    if (!b.waiting) b.site = me.site;
    if (b.site.line != line || std::string_view(b.site.file) != file)
      fail(me.site.text() + ": other threads of the block wait in " + b.site.text());
    b.all &= predicate != 0;
    b.any |= predicate != 0;
    b.count += predicate != 0;
    const void* object = &memory->sync->barrier[b.generation & 1];
    tsan::release(object);
    me.state = State::at_barrier;
    if (++b.waiting == live) open_barrier();
    park();
    tsan::acquire(object);
  }

  void release_complete_meetings(unsigned warp) {
    for (Meeting& m : warps[warp].meetings) complete(warp, m);
  }

  void complete(unsigned warp, Meeting& m) {
    const uint32_t needed = m.mask & warps[warp].alive;  // lanes of the mask that exist and have not returned
    if (!m.arrived || (m.arrived & needed) != needed) return;
    const uint32_t who = m.arrived;
    m.present[m.generation & 1] = who;
    m.arrived = 0;
    ++m.generation;
    ++statistics.warp_operations;
    for (unsigned lane = 0; lane < 32; ++lane)
      if (who >> lane & 1) wake(threads[warp * 32 + lane]);
  }

  std::string where_am_i() const {
    const auto triple = [](auto v) {
      return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
    };
    return "block " + triple(blockIdx) + " thread " + (current ? triple(current->index) : "none");
  }

 private:
  void open_barrier() {
    BarrierState& b = barrier_state;
    barrier_result = {b.all, b.any, b.count};
    b = {.site = {}, .generation = b.generation + 1};
    ++statistics.barriers;
    for (unsigned i = 0; i < size; ++i)
      if (threads[i].state == State::at_barrier) wake(threads[i]);
  }

  template <class StackOf>
  void prepare(unsigned num_threads, StackOf stack) {
    size = live = num_threads;
    ++serial;
    barrier_state = {};
    failure.clear();
    std::fill(std::begin(observed), std::end(observed), nullptr);
    ready_.clear();
    head_ = 0;
    host_tsan_ = tsan::current();
    if (threads.size() < size) threads.resize(size);
    ready_.reserve(4096 + 2 * size);  // nothing is allocated by a fiber: TSan would hold it against the host
    warps.assign((size + 31) / 32, Warp{{}, 0xffffffffu});
    for (Warp& w : warps) w.meetings.reserve(kMasks);
    if (size % 32) warps.back().alive = (1u << size % 32) - 1;
    for (unsigned i = 0; i < size; ++i) {
      Thread& t = threads[i];
      t.linear = i;
      t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
      t.stack = stack(i);
      t.asan_fake = nullptr;
      t.site = {"start", "", 0};
      t.context.prepare(t.stack, StackPool::kBytes, i, &Block::entry);
      if (!t.tsan) t.tsan = tsan::create();
      wake(t);
    }
  }

  unsigned next(Random& random) {
    if (options.order == Order::forward) return ready_[head_++];
    size_t k = ready_.size() - 1;
    if (options.order == Order::random) k = head_ + random.below(ready_.size() - head_);
    const unsigned id = ready_[k];
    ready_[k] = ready_.back();
    ready_.pop_back();
    return id;
  }

  SIMT_SWITCHES void resume(Thread& t) {
    current = &t;
    threadIdx = t.index;
    asan::start_switch(&host_fake_, t.stack, StackPool::kBytes);
    tsan::switch_to(t.tsan);
    Context::swap(host_, t.context);
    asan::finish_switch(host_fake_, nullptr, nullptr);
    current = nullptr;
    if (head_ > 4096) {  // the served part of the queue
      ready_.erase(ready_.begin(), ready_.begin() + static_cast<long>(head_));
      head_ = 0;
    }
  }

  static void entry();  // first function on a fiber's stack

  void finish() {  // the kernel function of the current thread has returned
    tsan::Quiet quiet;
    Thread& me = *current;
    me.state = State::returned;
    --live;
    warps[me.warp()].alive &= ~(1u << me.lane());
    if (barrier_state.waiting)
      fail(std::to_string(barrier_state.waiting) + " thread(s) wait in " + barrier_state.site.text() +
           ", but this thread has returned");
    release_complete_meetings(me.warp());
  }

  std::string stuck() const {
    std::string text = "deadlock in block " + std::to_string(blockIdx.x) + ":";
    unsigned shown = 0;
    for (unsigned i = 0; i < size && shown < 4; ++i)
      if (threads[i].state != State::returned) {
        text += " thread " + std::to_string(i) + " in " + threads[i].site.text() + ";";
        ++shown;
      }
    return text;
  }

  Context host_;
  void *host_tsan_ = nullptr, *host_fake_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
  std::vector<unsigned> ready_;
  size_t head_ = 0;
};

// Never destroyed: after a fault the fibers that were left behind still belong to it.
inline Block& block = *new Block;

inline void Block::entry() {
  asan::finish_switch(nullptr, &block.host_stack_, &block.host_stack_bytes_);
  tsan::acquire(&block.launch_start);
  block.call(block.arguments);
  tsan::release(&block.launch_end);
  block.finish();
  block.park(true);
  __builtin_trap();
}

}  // namespace simt
