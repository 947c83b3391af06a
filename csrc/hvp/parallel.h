// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

namespace curvlab::hvp {

constexpr std::int64_t kSerialElements = 65536;  // below, starting a second thread costs more than it saves

// body(begin, end) over all items, on several threads where the work is worth it.
template <class Body>
void for_items(std::int64_t items, std::int64_t elements, const Body& body) {
  if (elements < kSerialElements || items < 2) {
    body(std::int64_t{0}, items);
    return;
  }
  const std::int64_t per_item = (elements + items - 1) / items;
  at::parallel_for(0, items, (kSerialElements + per_item - 1) / per_item, body);
}

}  // namespace curvlab::hvp
