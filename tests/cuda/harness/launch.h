// SPDX-License-Identifier: Apache-2.0
// CURVLAB_LAUNCH on the host: checks the configuration as a device would, then runs block after block.
#pragma once
#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "block.h"
#include "runtime_api.h"

namespace simt {

inline StackPool& stacks = *new StackPool;
// TSan has 8128 slots: one for every CUDA thread of a launch, one for every block that calls a fence, and a few more.
constexpr uint64_t kTsanThreadLimit = 7500;

inline cudaError_t check_configuration(const void* kernel, dim3 grid, dim3 threads, size_t dynamic_bytes) {
  const bool bad_grid = !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535;
  const uint64_t n = uint64_t(threads.x) * threads.y * threads.z;
  const bool bad_block = !n || n > 1024 || threads.x > 1024 || threads.y > 1024 || threads.z > 64;
  if (bad_grid || bad_block) return cudaErrorInvalidConfiguration;
  return dynamic_bytes > dynamic_limit(kernel) ? cudaErrorInvalidValue : cudaSuccess;
}

inline std::vector<uint64_t> block_order(uint64_t blocks, Random& random) {
  std::vector<uint64_t> ids(blocks);
  std::iota(ids.begin(), ids.end(), uint64_t(0));
  if (options.order == Order::reverse) std::reverse(ids.begin(), ids.end());
  if (options.order == Order::random)
    for (uint64_t i = blocks; i > 1; --i) std::swap(ids[i - 1], ids[random.below(i)]);
  return ids;
}

// Under TSan no two CUDA threads of a launch share a TSan fiber, a stack, or shared memory: then nothing orders two
// blocks but the kernel's own fences and atomics, and a race between blocks is a race to TSan. Reports about fibers
// that are gone are dropped, so they live until the launch ends.
class TsanFibers {
 public:
  void retire(Block& b) {
    for (Thread& t : b.threads) retire(t.tsan);
    retire(b.fence_view);
  }
  ~TsanFibers() {
    if (block.failure.empty())
      for (void* f : retired_) tsan::destroy(f);
  }

 private:
  void retire(void*& fiber) {
    if (fiber) retired_.push_back(fiber);
    fiber = nullptr;
  }
  std::vector<void*> retired_;
};

// After a fault: what the fibers did so far is over, although they never returned.
SIMT_SWITCHES inline void abandon(Block& b) {
  if (!tsan::kEnabled) return;
  void* host = tsan::current();
  for (Thread& t : b.threads)
    if (t.tsan && t.state != State::returned) {
      tsan::switch_to(t.tsan);
      tsan::release(&b.launch_end);
      tsan::switch_to(host);
    }
}

inline void run_grid(dim3 grid, dim3 threads, size_t dynamic_bytes) {
  tsan::Quiet quiet;
  const unsigned num_threads = threads.x * threads.y * threads.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (tsan::kEnabled && blocks * num_threads > kTsanThreadLimit)
    throw Fault("the TSan build takes at most 7500 threads a launch: use fewer or smaller blocks");
  gridDim = grid;
  blockDim = threads;
  ++statistics.launches;
  Random random(options.seed);
  TsanFibers fibers;
  std::vector<SharedMemory> memories;
  uint64_t run = 0;
  tsan::release(&block.launch_start);
  for (uint64_t id : block_order(blocks, random)) {
    blockIdx = {unsigned(id % grid.x), unsigned(id / grid.x % grid.y), unsigned(id / grid.x / grid.y)};
    if (!tsan::kEnabled) memories.clear();
    block.memory = &memories.emplace_back(dynamic_bytes);
    const uint64_t first_stack = tsan::kEnabled ? run * num_threads : 0;
    block.run(num_threads, random, [&](unsigned i) { return stacks.at(first_stack + i); });
    if (!block.failure.empty()) abandon(block);
    fibers.retire(block);
    ++run;
    if (!block.failure.empty()) break;
  }
  statistics.blocks += run;
  statistics.threads += run * num_threads;
  tsan::acquire(&block.launch_end);
  block.memory = nullptr;
  if (!block.failure.empty()) {
    stacks.forget_poison();
    throw Fault(block.failure);
  }
}

// Arguments are converted and copied once, as by <<<>>>; every thread then gets its own copy.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 threads, size_t dynamic_bytes, cudaStream_t, Args&&... args) {
  if (block.current) block.fail("a kernel may not launch a kernel");
  const void* address = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t e = check_configuration(address, grid, threads, dynamic_bytes); e != cudaSuccess) {
    last_error = e;
    return;
  }
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> args;
  } call{kernel, {static_cast<std::decay_t<Params>>(std::forward<Args>(args))...}};
  block.arguments = &call;
  block.call = [](const void* p) {
    const Call& c = *static_cast<const Call*>(p);
    std::apply(c.kernel, c.args);
  };
  run_grid(grid, threads, dynamic_bytes);
}

inline void* shared_array(const void* key, size_t bytes, size_t alignment) {
  tsan::Quiet quiet;
  void* p = block.memory->array(key, bytes, alignment);
  if (!p) block.fail("more than 48 KiB of static shared memory");
  return p;
}

}  // namespace simt
