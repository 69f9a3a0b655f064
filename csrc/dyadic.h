// Aligned dyadic runs of segments: node i of level l covers segments i * 2^l ... (i + 1) * 2^l - 1.
//
// Segments are numbered from the first append on and never renumbered, so a product is never taken in the wrong order
// where the ring wraps. Runs on the host and on a CUDA device.
#ifndef SPARSE_RTRL_DYADIC_H_
#define SPARSE_RTRL_DYADIC_H_

#include <cstdint>

#if defined(__CUDACC__)
#define SPARSE_RTRL_HOST_DEVICE __host__ __device__
#else
#define SPARSE_RTRL_HOST_DEVICE
#endif

namespace sparse_rtrl {

constexpr int kMaxLevels = 32;  // of a tree

struct NodeId {
  int level;
  int64_t index;
};

// Highest level that fits a window of `capacity` segments.
SPARSE_RTRL_HOST_DEVICE inline int highest_level(int64_t capacity) {
  int level = 0;
  while ((capacity >> (level + 1)) > 0) ++level;
  return level;
}

// Number of nodes that the append of segment `count - 1` completes above the leaves. They are of levels 1, 2, ... and
// each is the product of the last two nodes of the level below. `first` is the number of the first segment ever.
SPARSE_RTRL_HOST_DEVICE inline int completed_levels(int64_t count, int64_t first, int levels) {
  int level = 0;
  while (level < levels && count % (int64_t{2} << level) == 0 && count - (int64_t{2} << level) >= first) ++level;
  return level;
}

// The largest node that begins with segment `position` and ends before segment `count`. A walk of such nodes from
// `start` to `count` covers the segments `start ... count - 1`, oldest first, with at most 2 * levels + 2 of them unless
// levels are missing, when every node of the highest level counts.
SPARSE_RTRL_HOST_DEVICE inline NodeId covering_node(int64_t position, int64_t count, int levels) {
  int level = 0;
  while (level < levels && position % (int64_t{2} << level) == 0 && position + (int64_t{2} << level) <= count) {
    ++level;
  }
  return {level, position >> level};
}

// Merges per append of a classical segment tree, which refreshes every ancestor of the new leaf.
SPARSE_RTRL_HOST_DEVICE inline int classical_merges_per_append(int64_t capacity) { return highest_level(capacity); }

}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_DYADIC_H_
