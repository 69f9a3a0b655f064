// Rings of preallocated nodes, and what the operations on them take. Runs on the host and on a CUDA device.
#ifndef SPARSE_RTRL_RINGS_H_
#define SPARSE_RTRL_RINGS_H_

#include <cstdint>

#include "block_sparse.h"
#include "dyadic.h"

namespace sparse_rtrl {

// The nodes of one level of every stream's tree: node i stands at place i % length. Slot sets are sorted and filled up
// with their largest slot.
template <typename T>
struct Ring {
  int64_t* rows;     // (length, B, R)
  int64_t* cols;     // (length, B, C)
  T* blocks;         // (length, B, R * D, C * D)
  T* loss_rows;      // (length, B, C * D)
  int64_t length;    // L >> level
  int64_t num_rows;  // R
  int64_t num_cols;  // C
};

// A tree of every stream.
template <typename T>
struct Tree {
  Ring<T> levels[kMaxLevels];
  int highest;        // highest level that is kept
  int64_t batch;      // B
  int64_t num_slots;  // S
  int64_t slot_size;  // D
};

// Number of distinct slots in front of the repetitions that fill up a set.
SPARSE_RTRL_HOST_DEVICE inline int64_t num_distinct(const int64_t* slots, int64_t size) {
  return size == 0 ? 0 : find_slot(slots, size, slots[size - 1]) + 1;
}

// One stream's node of a ring, without the repetitions that fill up its slot sets.
template <typename T>
SPARSE_RTRL_HOST_DEVICE inline BlockSparseView<T> node_view(const Ring<T>& ring, int64_t batch, int64_t slot_size,
                                                            int64_t index, int64_t stream) {
  const int64_t at = index % ring.length * batch + stream;
  const int64_t* rows = ring.rows + at * ring.num_rows;
  const int64_t* cols = ring.cols + at * ring.num_cols;
  const int64_t width = ring.num_cols * slot_size;
  return {rows,
          cols,
          ring.blocks + at * ring.num_rows * slot_size * width,
          ring.loss_rows + at * width,
          num_distinct(rows, ring.num_rows),
          num_distinct(cols, ring.num_cols),
          slot_size,
          width};
}

// Append of one segment: the leaf is written and every node that it completes is built. `count` grows by one.
template <typename T>
struct TreeAppend {
  Tree<T> tree;
  int64_t* count;          // segments appended
  int64_t first;           // number of the first segment ever
  const T* Jh;             // (B, kw * D, ks * D)
  const int64_t* write;    // (B, kw)
  const int64_t* support;  // (B, ks)
  const T* loss_row;       // (B, H), zero outside the support, or null
  int64_t num_write;       // kw
  int64_t num_support;     // ks
};

// Products of the segments starts[q] ... *count - 1 of stream streams[q].
template <typename T>
struct SuffixProduct {
  Tree<T> tree;
  const int64_t* count;
  const int64_t* streams;  // (Q,)
  const int64_t* starts;   // (Q,), from *count on for the identity
  int64_t products;        // Q
  int64_t* rows;           // (Q, R'), out
  int64_t* cols;           // (Q, C'), out
  T* blocks;               // (Q, R' * D, C' * D), out
  T* loss_rows;            // (Q, C' * D), out
  int64_t num_rows;        // R', room for every row of a product
  int64_t num_cols;        // C'
};

// Influence matrices through the segments starts[m] ... *count - 1, each column tile read and written once.
template <typename T>
struct CatchUp {
  T* P;                     // (G, H + 1, N)
  int64_t rows_per_matrix;  // H + 1
  int64_t columns;          // N
  Ring<T> ring;
  int64_t batch;         // B
  int64_t slot_size;     // D
  const int64_t* count;
  const int64_t* streams;  // (M,)
  const int64_t* groups;   // (M,), distinct
  const int64_t* starts;   // (M,), from *count on for a matrix that stays
  int64_t matrices;        // M
};

// Loss rows of many suffixes in one backward sweep over the segments.
template <typename T>
struct SuffixLossRows {
  Ring<T> ring;
  int64_t batch;      // B
  int64_t slot_size;  // D
  int64_t hidden;     // H
  const int64_t* count;
  const int64_t* starts;  // (B, E), from *count on for an empty suffix
  const T* newest;        // row vector behind the newest segment, (B, H)
  T* out;                 // (B, E, H)
  int64_t experts;        // E
};

}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_RINGS_H_
