// SPDX-License-Identifier: Apache-2.0
// filter_norms: for every tensor w of a list the L2 norm of each slice along its first dimension,
//   out[j] = sqrt(sum_i w[j, i]^2),  i over all other dimensions,
// float64, the rows of all tensors one after another. A 1-d tensor has slices of one element (|w_j|), a 0-d tensor is
// one slice. Sums are in double, in a fixed order.
#pragma once

#include <cstdint>

#include "common/compensated_sum.h"
#include "common/elements.h"
#include "common/hd.h"

namespace curvlab::norms {

struct FilterEntry {
  const void* x;  // rows lie one after another, each dense
  std::int64_t rows;
  std::int64_t row_numel;
  std::int64_t first_row;   // index of this tensor's first row in the output
  std::int64_t first_item;  // index of its first work item
  std::int32_t type;        // ElementType
};
static_assert(sizeof(FilterEntry) == 48, "640 entries must fit the 32,764 bytes of kernel parameters");

constexpr int kFilterSmallTable = 64;    // entries of the smaller parameter block
constexpr int kFilterLargeTable = 640;   // entries that fit into the parameters of one launch
constexpr int kRowsPerItem = 8;          // one warp a row
constexpr std::int64_t kLongRow = 8192;  // elements from which a row has a block of its own

CURVLAB_HD std::int64_t item_count(const FilterEntry& entry) {
  return entry.row_numel >= kLongRow ? entry.rows : (entry.rows + kRowsPerItem - 1) / kRowsPerItem;
}

CURVLAB_HD double square(double value) { return value * value; }

// Fills first_row and first_item of every entry; returns the number of work items (a block's share each).
inline std::int64_t assign_items(FilterEntry* entries, std::int64_t tensors) {
  std::int64_t items = 0, rows = 0;
  for (std::int64_t t = 0; t < tensors; ++t) {
    entries[t].first_row = rows;
    entries[t].first_item = items;
    rows += entries[t].rows;
    items += item_count(entries[t]);
  }
  return items;
}

}  // namespace curvlab::norms
