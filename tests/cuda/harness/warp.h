// SPDX-License-Identifier: Apache-2.0
// Barriers, warp operations and fences, by CUDA's names. Every one knows the line it was called from.
// A warp operation stops the launch when the calling lane is not in its own mask, when lanes wait for each other under
// different masks, or when different operations meet. A lane that is named but has returned brings 0xFF bytes.
#pragma once
#include <cstring>
#include <type_traits>

#include "block.h"
#include "ordering.h"

namespace simt {

template <class T>
uint64_t to_bits(T v) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "warp operations move at most 8 bytes");
  uint64_t u = 0;
  std::memcpy(&u, &v, sizeof v);
  return u;
}
template <class T>
T from_bits(uint64_t u) {
  T v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

struct Gathered {  // what the lanes of one meeting brought
  const uint64_t* value;
  uint32_t present;
};

// Lanes may wait under different masks of one warp for a while (a part of the warp is ahead); only when two of them
// name each other can neither ever go on.
inline Meeting& meeting_for(Warp& warp, uint32_t mask, const Thread& me) {
  Meeting* found = nullptr;
  for (Meeting& m : warp.meetings) {
    if (m.mask == mask) {
      found = &m;
    } else if ((m.arrived & mask) && (m.mask >> me.lane() & 1)) {
      block.fail(me.site.text() + ": lanes of one warp wait for each other under different masks");
    }
  }
  if (found) return *found;
  if (warp.meetings.size() == kMasks) block.fail(me.site.text() + ": more than 64 different masks in one warp");
  warp.meetings.emplace_back().mask = mask;
  return warp.meetings.back();
}

inline Gathered meet(uint32_t mask, uint64_t value, const char* operation, const char* file, int line) {
  tsan::Quiet quiet;
  Thread& me = *block.current;
  me.site = {operation, file, line};
  if (!(mask >> me.lane() & 1)) block.fail(me.site.text() + ": the calling lane is not in its own mask");
  Warp& warp = block.warps[me.warp()];
  Meeting& m = meeting_for(warp, mask, me);
  const size_t index = static_cast<size_t>(&m - warp.meetings.data());  // the vector may grow while we wait
  const unsigned parity = m.generation & 1;
  if (m.arrived && std::strcmp(m.operation, operation) != 0)
    block.fail(me.site.text() + ": other lanes of the mask wait in " + m.operation);
  if (!m.arrived) std::memset(m.value[parity], 0xFF, sizeof m.value[parity]);
  m.operation = operation;
  m.value[parity][me.lane()] = value;
  m.arrived |= 1u << me.lane();
  const bool orders_memory = std::strcmp(operation, "__syncwarp") == 0;  // shuffles and votes do not
  const void* object = &block.memory->sync->warp[me.warp()][parity];
  if (orders_memory) tsan::release(object);
  me.state = State::at_warp;
  block.complete(me.warp(), m);
  block.park();
  if (orders_memory) tsan::acquire(object);
  const Meeting& after = block.warps[me.warp()].meetings[index];
  return {after.value[parity], after.present[parity]};
}

enum class Shuffle { index, up, down, exclusive_or };

template <class T>
T shuffle(Shuffle kind, uint32_t mask, T value, int argument, int width, const Site& site) {
  const Gathered all = meet(mask, to_bits(value), site.operation, site.file, site.line);
  tsan::Quiet quiet;
  const int lane = static_cast<int>(block.current->lane()), base = lane & ~(width - 1);
  int source = lane;
  if (kind == Shuffle::index) source = base + (argument & (width - 1));
  if (kind == Shuffle::up) source = lane - argument < base ? lane : lane - argument;
  if (kind == Shuffle::down) source = lane + argument >= base + width ? lane : lane + argument;
  if (kind == Shuffle::exclusive_or) source = (lane ^ argument) >= base + width ? lane : lane ^ argument;
  return from_bits<T>(all.value[source]);
}

inline uint32_t ballot(uint32_t mask, bool predicate, const Site& site) {
  const Gathered all = meet(mask, predicate, site.operation, site.file, site.line);
  tsan::Quiet quiet;
  uint32_t result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) result |= uint32_t((all.present >> lane & 1) && all.value[lane]) << lane;
  return result;
}

template <class T, class Combine>
T reduce(uint32_t mask, T value, Combine combine, const Site& site) {
  const Gathered all = meet(mask, to_bits(value), site.operation, site.file, site.line);
  tsan::Quiet quiet;
  bool first = true;
  T result{};
  for (unsigned lane = 0; lane < 32; ++lane)
    if (all.present >> lane & 1) {
      const T v = from_bits<T>(all.value[lane]);
      result = first ? v : combine(result, v);
      first = false;
    }
  return result;
}

}  // namespace simt

#define SIMT_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_HERE \
  simt::Site { __func__, file, line }

inline void __syncthreads(SIMT_CALLER) { simt::block.barrier(0, __func__, file, line); }
inline int __syncthreads_and(int p, SIMT_CALLER) {
  simt::block.barrier(p, __func__, file, line);
  return simt::block.barrier_result.all;
}
inline int __syncthreads_or(int p, SIMT_CALLER) {
  simt::block.barrier(p, __func__, file, line);
  return simt::block.barrier_result.any;
}
inline int __syncthreads_count(int p, SIMT_CALLER) {
  simt::block.barrier(p, __func__, file, line);
  return simt::block.barrier_result.count;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_CALLER) { simt::meet(mask, 0, __func__, file, line); }

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::Shuffle::index, mask, v, source, width, SIMT_HERE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::Shuffle::up, mask, v, static_cast<int>(delta), width, SIMT_HERE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::Shuffle::down, mask, v, static_cast<int>(delta), width, SIMT_HERE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::Shuffle::exclusive_or, mask, v, lanes, width, SIMT_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_CALLER) { return simt::ballot(mask, p != 0, SIMT_HERE); }
inline int __any_sync(unsigned mask, int p, SIMT_CALLER) { return simt::ballot(mask, p != 0, SIMT_HERE) != 0; }
inline int __all_sync(unsigned mask, int p, SIMT_CALLER) { return simt::ballot(mask, p == 0, SIMT_HERE) == 0; }
template <class T>
T __reduce_add_sync(unsigned mask, T v, SIMT_CALLER) {
  return simt::reduce(mask, v, [](T a, T b) { return T(a + b); }, SIMT_HERE);
}
template <class T>
T __reduce_max_sync(unsigned mask, T v, SIMT_CALLER) {
  return simt::reduce(mask, v, [](T a, T b) { return a > b ? a : b; }, SIMT_HERE);
}
template <class T>
T __reduce_min_sync(unsigned mask, T v, SIMT_CALLER) {
  return simt::reduce(mask, v, [](T a, T b) { return a < b ? a : b; }, SIMT_HERE);
}
// Only the calling lane: lawful, and the least that code may rely on.
inline unsigned __activemask() { return 1u << simt::block.current->lane(); }
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }
inline void __threadfence_system() { simt::fence(); }
