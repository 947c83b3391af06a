// SPDX-License-Identifier: Apache-2.0
// A thread's working memory, kept between calls: fresh pages at every call took 10-20 % of a sparse convolution. On
// huge pages where the system gives them: a strip of 1.4 MB is 340 small ones, more than the first TLB holds.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>

namespace curvlab::sparse_conv {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // At least `bytes`, what they hold is undefined.
  void* get(std::size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      const std::size_t rounded = (bytes + kPage - 1) / kPage * kPage;
      data_ = std::aligned_alloc(kPage, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      madvise(data_, rounded, MADV_HUGEPAGE);
#endif
      size_ = rounded;
    }
    return data_;
  }

  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }

 private:
  static constexpr std::size_t kPage = std::size_t{2} << 20;
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace curvlab::sparse_conv
