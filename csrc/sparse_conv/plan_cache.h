// SPDX-License-Identifier: Apache-2.0
// Plans kept per `indices` tensor and geometry, for as long as the tensor lives unchanged. A tensor is known by itself
// (a weak reference: a new one at the same address is another), its version counter (which in-place operations raise),
// its memory and size.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <array>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>

namespace curvlab::sparse_conv {

using PlanKey = std::array<std::int64_t, 18>;

template <class Plan>
class PlanCache {
 public:
  // The plan of (indices, key), made by `make` where there is none. An inference tensor has no version: never kept.
  template <class Make>
  std::shared_ptr<const Plan> get(const at::Tensor& indices, const PlanKey& key, const Make& make) {
    if (indices.is_inference()) return std::make_shared<const Plan>(make());
    const auto version = static_cast<std::uint32_t>(indices._version());
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
        if (entry->holds(indices, version, key)) {
          entries_.splice(entries_.begin(), entries_, entry);  // last used first
          return entry->plan;
        }
      }
    }
    auto plan = std::make_shared<const Plan>(make());
    const std::lock_guard<std::mutex> guard(mutex_);
    entries_.remove_if([&](const Entry& entry) { return entry.is_stale(indices, version); });
    entries_.push_front({c10::weak_intrusive_ptr<c10::TensorImpl>(indices.getIntrusivePtr()), version,
                         indices.const_data_ptr(), indices.numel(), key, plan});
    if (entries_.size() > kMost) entries_.pop_back();
    return plan;
  }

 private:
  static constexpr std::size_t kMost = 256;  // a network's layers, in a few batch shapes

  struct Entry {
    c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
    std::uint32_t version;
    const void* data;
    std::int64_t count;
    PlanKey key;
    std::shared_ptr<const Plan> plan;

    bool is_of(const at::Tensor& indices) const {
      return tensor._unsafe_get_target() == indices.unsafeGetTensorImpl() && !tensor.expired();
    }
    bool holds(const at::Tensor& indices, std::uint32_t now, const PlanKey& wanted) const {
      return is_of(indices) && version == now && data == indices.const_data_ptr() && count == indices.numel() &&
             key == wanted;
    }
    bool is_stale(const at::Tensor& indices, std::uint32_t now) const {
      return tensor.expired() ||
             (is_of(indices) && (version != now || data != indices.const_data_ptr() || count != indices.numel()));
    }
  };

  std::mutex mutex_;
  std::list<Entry> entries_;
};

}  // namespace curvlab::sparse_conv
