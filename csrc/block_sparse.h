// Views of block-sparse maps, and the slot sets of their products. Runs on the host and on a CUDA device.
#ifndef SPARSE_RTRL_BLOCK_SPARSE_H_
#define SPARSE_RTRL_BLOCK_SPARSE_H_

#include <cstdint>

#include "dyadic.h"

namespace sparse_rtrl {

// One stream's map of the augmented state: the slots `rows` become `blocks` times the slots `cols`, all other slots
// are copied, and the loss grows by `loss_row` times the slots `cols`. Slots are sorted and distinct; `rows` is a subset
// of `cols`.
template <typename T>
struct BlockSparseView {
  const int64_t* rows;  // (R,)
  const int64_t* cols;  // (C,)
  const T* blocks;      // (R * D, C * D), rows `width` apart
  const T* loss_row;    // (C * D,)
  int64_t num_rows;     // R
  int64_t num_cols;     // C
  int64_t slot_size;    // D
  int64_t width;        // at least C * D
};

// Slots of the union of two sets of k1 and k2, whatever they hold.
SPARSE_RTRL_HOST_DEVICE inline int64_t union_size(int64_t k1, int64_t k2, int64_t num_slots) {
  return k1 + k2 < num_slots ? k1 + k2 : num_slots;
}

// Sorted union of two sorted sets; the largest slot is repeated up to `size` entries. Returns the number of distinct
// slots; where that exceeds `size`, the rest is not written.
SPARSE_RTRL_HOST_DEVICE inline int64_t union_slots(const int64_t* first, int64_t k1, const int64_t* second, int64_t k2,
                                                   int64_t* out, int64_t size) {
  int64_t i = 0, j = 0, n = 0, largest = -1;
  while (i < k1 || j < k2) {
    const int64_t slot = j >= k2 || (i < k1 && first[i] <= second[j]) ? first[i++] : second[j++];
    if (slot == largest) continue;
    largest = slot;
    if (n < size) out[n] = slot;
    ++n;
  }
  for (int64_t rest = n; rest < size; ++rest) out[rest] = n > 0 ? largest : 0;
  return n;
}

// Place of a slot in a sorted set, the first one where it is repeated, or -1.
SPARSE_RTRL_HOST_DEVICE inline int64_t find_slot(const int64_t* slots, int64_t size, int64_t slot) {
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (slots[middle] < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < size && slots[low] == slot ? low : -1;
}

}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_BLOCK_SPARSE_H_
