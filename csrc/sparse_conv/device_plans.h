// SPDX-License-Identifier: Apache-2.0
// Plans whose lists lie in device memory, and the cache of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "sparse_conv/plan_cache.h"
#include "sparse_conv/plan_cuda.h"

namespace curvlab::sparse_conv {

class DevicePlan {
 public:
  // Copies the lists and waits for that, so that any stream may use them.
  DevicePlan(const GatherPlan& plan, at::Device device)
      : arguments_(plan.arguments), stream_(c10::cuda::getCurrentCUDAStream(device.index())) {
    std::int64_t bytes = 0;
    const auto place = [&](const auto& list) {
      const std::int64_t start = bytes;
      bytes += (static_cast<std::int64_t>(list.size() * sizeof(list[0])) + 15) / 16 * 16;
      return start;
    };
    const std::int64_t phases = place(plan.phases), order = place(plan.order), first = place(plan.first);
    const std::int64_t offsets = place(plan.offsets), taps = place(plan.taps), source = place(plan.source);
    const at::Tensor on_host = at::empty({bytes}, at::kByte);
    auto* memory = static_cast<unsigned char*>(on_host.mutable_data_ptr());
    const auto copy = [&](const auto& list, std::int64_t start) {
      if (!list.empty()) std::memcpy(memory + start, list.data(), list.size() * sizeof(list[0]));
    };
    copy(plan.phases, phases), copy(plan.order, order), copy(plan.first, first);
    copy(plan.offsets, offsets), copy(plan.taps, taps), copy(plan.source, source);
    lists_ = on_host.to(device);
    const auto* base = static_cast<const unsigned char*>(lists_.const_data_ptr());
    arguments_.phases = reinterpret_cast<const Phase*>(base + phases);
    arguments_.order = reinterpret_cast<const std::int32_t*>(base + order);
    arguments_.first = reinterpret_cast<const std::int32_t*>(base + first);
    arguments_.offsets = reinterpret_cast<const std::int32_t*>(base + offsets);
    arguments_.taps = reinterpret_cast<const Tap*>(base + taps);
    source_ = reinterpret_cast<const std::int32_t*>(base + source);
  }

  // For a launch on the current stream: should the plan go while that runs, its memory waits.
  const GatherArguments& arguments() const {
    const c10::cuda::CUDAStream current = c10::cuda::getCurrentCUDAStream(lists_.device().index());
    if (current != stream_) c10::cuda::CUDACachingAllocator::recordStream(lists_.storage().data_ptr(), current);
    return arguments_;
  }
  const std::int32_t* source() const { return source_; }

 private:
  GatherArguments arguments_;
  c10::cuda::CUDAStream stream_;  // whose memory the lists are
  at::Tensor lists_;
  const std::int32_t* source_;
};

// Never destroyed: at exit the device may be gone before.
inline PlanCache<DevicePlan>& device_plans() {
  static auto& plans = *new PlanCache<DevicePlan>;
  return plans;
}

// What a captured graph reads stays for the process's life: nobody tells when the graph goes.
inline void keep_for_graph(std::shared_ptr<const DevicePlan> plan) {
  static auto& mutex = *new std::mutex;
  static auto& kept = *new std::vector<std::shared_ptr<const DevicePlan>>;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& other : kept) {
    if (other == plan) return;
  }
  kept.push_back(std::move(plan));
}

}  // namespace curvlab::sparse_conv
