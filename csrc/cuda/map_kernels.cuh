// CUDA kernels of merge, suffix and catch-up, free of torch: bodies only, to be launched for all streams at once.
//
// Nodes lie in preallocated rings of fixed widths, so that everything a launch needs is on the device: gaps, experts
// and the choice of nodes are read there, without host synchronisation, and a launch can be captured in a CUDA graph.
// All offsets are 64 bit; sums are taken in the scalar type, in a fixed order.
#ifndef SPARSE_RTRL_CUDA_MAP_KERNELS_CUH_
#define SPARSE_RTRL_CUDA_MAP_KERNELS_CUH_

#include <cstdint>

#include "../block_sparse.h"
#include "../dyadic.h"

namespace sparse_rtrl {
namespace cuda {

constexpr int kThreads = 128;
constexpr int kColumns = 32;                      // columns of a tile: one warp reads a row of it in one transaction
constexpr int kRowThreads = kThreads / kColumns;  // rows that are worked on at once

// The nodes of one level of every stream's tree, each at its place in the ring of the level.
template <typename T>
struct Level {
  int64_t* rows;     // (ring, B, R)
  int64_t* cols;     // (ring, B, C)
  T* blocks;         // (ring, B, R * D, C * D)
  T* loss_row;       // (ring, B, C * D)
  int64_t num_rows;  // R = min(S, 2^level * kw)
  int64_t num_cols;  // C = min(S, 2^level * ks)
};

template <typename T>
struct Tree {
  const Level<T>* levels;  // on the device
  int highest;             // highest level that is kept
  int64_t capacity;        // L
  int64_t batch;           // B
  int64_t num_slots;       // S
  int64_t slot_size;       // D
};

template <typename T>
__device__ BlockSparseView<T> node_view(const Tree<T>& tree, NodeId node, int64_t stream) {
  const Level<T>& level = tree.levels[node.level];
  const int64_t at = ring_slot(node, tree.capacity) * tree.batch + stream;
  const int64_t D = tree.slot_size;
  return {level.rows + at * level.num_rows,
          level.cols + at * level.num_cols,
          level.blocks + at * level.num_rows * level.num_cols * D * D,
          level.loss_row + at * level.num_cols * D,
          level.num_rows,
          level.num_cols,
          D};
}

// Entry (slot i, d; slot c, x) of a map, the identity where it has no such row.
template <typename T>
__device__ T map_entry(const BlockSparseView<T>& map, int64_t row_slot, int64_t d, int64_t col_slot, int64_t x) {
  const int64_t row = find_slot(map.rows, map.num_rows, row_slot);
  if (row < 0) return row_slot == col_slot && d == x ? T{1} : T{0};
  const int64_t col = find_slot(map.cols, map.num_cols, col_slot);
  if (col < 0) return T{0};
  return map.blocks[(row * map.slot_size + d) * map.num_cols * map.slot_size + col * map.slot_size + x];
}

// The product of two maps by one thread block; `out` has room for the slots of both. The newer map stands on the left.
template <typename T>
__device__ void merge(const BlockSparseView<T>& newer, const BlockSparseView<T>& older, int64_t* rows, int64_t num_rows,
                      int64_t* cols, int64_t num_cols, T* blocks, T* loss_row) {
  const int64_t D = newer.slot_size, ld = num_cols * D;
  if (threadIdx.x == 0) {
    union_slots(newer.rows, newer.num_rows, older.rows, older.num_rows, rows, num_rows);
    union_slots(newer.cols, newer.num_cols, older.cols, older.num_cols, cols, num_cols);
  }
  __syncthreads();
  for (int64_t at = threadIdx.x; at < (num_rows * D + 1) * ld; at += blockDim.x) {
    const int64_t row = at / ld, c = at % ld / D, x = at % D;
    T sum = T{0};
    if (is_first(cols, c)) {  // a repeated column holds zeros
      const int64_t col_slot = cols[c];
      const bool is_loss = row == num_rows * D;
      const int64_t row_slot = is_loss ? -1 : rows[row / D];
      const int64_t own = is_loss ? -1 : find_slot(newer.rows, newer.num_rows, row_slot);
      if (!is_loss && own < 0) {
        sum = map_entry(older, row_slot, row % D, col_slot, x);
      } else {
        const T* left = is_loss ? newer.loss_row : newer.blocks + (own * D + row % D) * newer.num_cols * D;
        for (int64_t k = 0; k < newer.num_cols; ++k) {
          if (!is_first(newer.cols, k)) continue;
          for (int64_t d = 0; d < D; ++d) sum += left[k * D + d] * map_entry(older, newer.cols[k], d, col_slot, x);
        }
        if (is_loss) {
          const int64_t col = find_slot(older.cols, older.num_cols, col_slot);
          if (col >= 0) sum += older.loss_row[col * D + x];
        }
      }
    }
    (row == num_rows * D ? loss_row + c * D + x : blocks + row * ld + c * D + x)[0] = sum;
  }
  __syncthreads();
}

// Builds the nodes of one level that the append of segment `*count - 1` completed; one thread block per stream.
// Launched for every level in turn; does nothing where the step counter says so.
template <typename T>
__device__ void merge_level(const Tree<T>& tree, int level, const int64_t* count, int64_t first) {
  if (level > completed_levels(*count, first, tree.highest)) return;
  const int64_t stream = blockIdx.x;
  const int64_t index = (*count >> level) - 1;
  const NodeId node{level, index};
  const Level<T>& to = tree.levels[level];
  const int64_t at = ring_slot(node, tree.capacity) * tree.batch + stream, D = tree.slot_size;
  merge(node_view(tree, NodeId{level - 1, 2 * index + 1}, stream),
        node_view(tree, NodeId{level - 1, 2 * index}, stream), to.rows + at * to.num_rows, to.num_rows,
        to.cols + at * to.num_cols, to.num_cols, to.blocks + at * to.num_rows * to.num_cols * D * D,
        to.loss_row + at * to.num_cols * D);
}

// Products of the segments `starts[q] ... *count - 1` of stream `streams[q]`, one thread block each; two buffers for
// the products on the way, each of the size of the result: slots (Q, 2 * S), numbers (Q, (H + 1) * H).
template <typename T>
__device__ void suffix_product(const Tree<T>& tree, const int64_t* streams, const int64_t* starts, const int64_t* count,
                               int64_t* slots_0, T* numbers_0, int64_t* slots_1, T* numbers_1) {
  const int64_t q = blockIdx.x, S = tree.num_slots, H = S * tree.slot_size;
  NodeId nodes[2 * kMaxLevels];
  const int64_t size = cover(starts[q], *count, tree.highest, nodes, int64_t{2 * kMaxLevels});
  // The result stands in buffer 0: the first merge, with the identity, goes where the parity asks for.
  BlockSparseView<T> product{nullptr, nullptr, nullptr, nullptr, 0, 0, tree.slot_size};
  for (int64_t i = 0; i < size; ++i) {
    const bool to_0 = (size - 1 - i) % 2 == 0;
    int64_t* slots = (to_0 ? slots_0 : slots_1) + q * 2 * S;
    T* numbers = (to_0 ? numbers_0 : numbers_1) + q * (H + 1) * H;
    const BlockSparseView<T> node = node_view(tree, nodes[i], streams[q]);
    const int64_t num_rows = union_size(node.num_rows, product.num_rows, S);
    const int64_t num_cols = union_size(node.num_cols, product.num_cols, S);
    T* loss_row = numbers + num_rows * num_cols * tree.slot_size * tree.slot_size;
    merge(node, product, slots, num_rows, slots + S, num_cols, numbers, loss_row);
    product = BlockSparseView<T>{slots, slots + S, numbers, loss_row, num_rows, num_cols, tree.slot_size};
  }
}

// Influence matrices through every segment since their start: a tile of columns is read into shared memory, moved
// through the segments, and written once. One thread block per (matrix, tile). A matrix with a start at or after
// `*count` stays.
template <typename T>
__device__ void catch_up(const Tree<T>& tree, T* P, int64_t columns, const int64_t* streams, const int64_t* groups,
                         const int64_t* starts, const int64_t* count, T* tile, T* out) {
  const int64_t D = tree.slot_size, hidden = tree.num_slots * D;
  const int64_t matrix = blockIdx.x, column = int64_t{blockIdx.y} * kColumns + threadIdx.x % kColumns;
  const int lane = threadIdx.x % kColumns, first_row = threadIdx.x / kColumns;
  const int64_t stream = streams[matrix];
  if (starts[matrix] >= *count) return;
  T* from = P + groups[matrix] * (hidden + 1) * columns;
  for (int64_t h = first_row; h <= hidden; h += kRowThreads) {
    tile[h * kColumns + lane] = column < columns ? from[h * columns + column] : T{0};
  }
  __syncthreads();
  for (int64_t segment = starts[matrix]; segment < *count; ++segment) {
    const BlockSparseView<T> node = node_view(tree, NodeId{0, segment}, stream);
    const int64_t w = node.num_rows * D, r = node.num_cols * D;
    for (int64_t i = first_row; i <= w; i += kRowThreads) {
      const T* left = i < w ? node.blocks + i * r : node.loss_row;
      T sum = i < w ? T{0} : tile[hidden * kColumns + lane];
      for (int64_t c = 0; c < node.num_cols; ++c) {
        const T* right = tile + node.cols[c] * D * kColumns + lane;
        for (int64_t d = 0; d < D; ++d) sum += left[c * D + d] * right[d * kColumns];
      }
      out[i * kColumns + lane] = sum;
    }
    __syncthreads();
    for (int64_t i = first_row; i <= w; i += kRowThreads) {
      if (i == w) {
        tile[hidden * kColumns + lane] = out[i * kColumns + lane];
      } else if (is_first(node.rows, i / D)) {
        tile[(node.rows[i / D] * D + i % D) * kColumns + lane] = out[i * kColumns + lane];
      }
    }
    __syncthreads();
  }
  if (column < columns) {
    for (int64_t h = first_row; h <= hidden; h += kRowThreads) from[h * columns + column] = tile[h * kColumns + lane];
  }
}

}  // namespace cuda
}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_CUDA_MAP_KERNELS_CUH_
