// CUDA kernel bodies of the operations on rings, free of torch. One launch serves all streams: the count, the starts
// and the choice of nodes are read on the device, so that launches can be captured in a CUDA graph. Offsets into rings
// and influence matrices have 64 bits, sums are taken in the scalar type in a fixed order, and nothing is atomic.
//
// Products and replays are the same thing: a tile of columns stands in shared memory and goes through one node after
// the other. The columns are those of influence matrices, or of the first node of a product.
#ifndef SPARSE_RTRL_CUDA_TREE_KERNELS_CUH_
#define SPARSE_RTRL_CUDA_TREE_KERNELS_CUH_

#include <cstddef>
#include <cstdint>

#include "../rings.h"

namespace sparse_rtrl {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 2;  // at least: up to 128 registers a thread
constexpr int kDepth = 16;          // columns of a node's blocks that are staged at once
constexpr int kRowsPerThread = 4;   // of a panel
constexpr int kSweepThreads = 512;  // of the sweep of loss rows
constexpr int kSweepColumns = 64;   // columns that its threads sum side by side

// One stream's node in its ring, its slot sets filled up.
template <typename T>
struct NodePlace {
  int64_t* rows;  // (R,)
  int64_t* cols;  // (C,)
  T* blocks;      // (R * D, C * D)
  T* loss_row;    // (C * D,)
  int num_rows;   // R
  int num_cols;   // C
};

template <typename T>
__device__ __forceinline__ NodePlace<T> node_place(const Ring<T>& ring, int64_t batch, int64_t slot_size,
                                                   int64_t index, int64_t stream) {
  const int64_t at = index % ring.length * batch + stream, width = ring.num_cols * slot_size;
  return {ring.rows + at * ring.num_rows,
          ring.cols + at * ring.num_cols,
          ring.blocks + at * ring.num_rows * slot_size * width,
          ring.loss_rows + at * width,
          static_cast<int>(ring.num_rows),
          static_cast<int>(ring.num_cols)};
}

// Place of a slot in a sorted set in shared memory, the first one where it is repeated, or -1.
__device__ __forceinline__ int find_place(const int32_t* slots, int size, int slot) {
  int low = 0, high = size;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (slots[middle] < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < size && slots[low] == slot ? low : -1;
}

__device__ __forceinline__ int distinct(const int32_t* slots, int size) {
  return size == 0 ? 0 : find_place(slots, size, slots[size - 1]) + 1;
}

// Copies a node's slot sets to shared memory; to be followed by a barrier.
template <typename T>
__device__ __forceinline__ void load_slots(const NodePlace<T>& node, int32_t* rows, int32_t* cols) {
  for (int i = threadIdx.x; i < node.num_rows; i += blockDim.x) rows[i] = static_cast<int32_t>(node.rows[i]);
  for (int i = threadIdx.x; i < node.num_cols; i += blockDim.x) cols[i] = static_cast<int32_t>(node.cols[i]);
}

// Lists the flagged slots in order and returns their number; to be followed by a barrier.
__device__ __forceinline__ int list_slots(const int32_t* flags, int num_slots, int32_t* out) {
  int total = 0;
  for (int s = 0; s < num_slots; ++s) total += flags[s];
  for (int s = threadIdx.x; s < num_slots; s += blockDim.x) {
    if (!flags[s]) continue;
    int rank = 0;
    for (int i = 0; i < s; ++i) rank += flags[i];
    out[rank] = s;
  }
  return total;
}

// Some numbers that are read at once.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize < 16 ? sizeof(T) * kSize : 16) Pack {
  T values[kSize];
};

// A tile of kColumns columns of the augmented state in shared memory, worked on by one thread block.
template <typename T, int kColumns>
class ColumnTile {
 public:
  static constexpr int kColumnThreads = kColumns < 16 ? kColumns : 16;
  static constexpr int kColumnsPerThread = kColumns / kColumnThreads;
  static constexpr int kPanel = kRowsPerThread * kThreads / kColumnThreads;  // rows that are computed at once
  static constexpr int kLeftStride = kPanel + 4;                             // keeps the banks of stores apart
  static constexpr int kLoads = kPanel * kDepth / kThreads;                  // numbers that a thread stages
  static constexpr int kRowsAtOnce = kThreads / kColumns;                    // rows of the tile that are copied at once
  static_assert(kLeftStride * kDepth >= kThreads, "partial sums of the loss row take the place of the left factor");

  // Bytes of shared memory, for nodes of at most `num_rows` row slots.
  static size_t shared_bytes(int64_t num_slots, int64_t slot_size, int64_t num_rows) {
    const int64_t hidden = num_slots * slot_size;
    return sizeof(T) * ((hidden + 2 + num_rows * slot_size) * kColumns + kDepth * kLeftStride) +
           sizeof(int32_t) * (padded(hidden) + 7 * num_slots);
  }

  __device__ ColumnTile(unsigned char* memory, int num_slots, int slot_size, int num_rows)
      : num_slots_(num_slots), slot_size_(slot_size), hidden_(num_slots * slot_size) {
    left_ = reinterpret_cast<T*>(memory);
    tile_ = left_ + kDepth * kLeftStride;
    staged_ = tile_ + (hidden_ + 2) * kColumns;
    source_ = reinterpret_cast<int32_t*>(staged_ + num_rows * slot_size * kColumns);
    rows_ = source_ + padded(hidden_);
    cols_ = rows_ + num_slots;
    all_rows_ = cols_ + num_slots;
    all_cols_ = all_rows_ + num_slots;
    row_flags_ = all_cols_ + num_slots;
    col_flags_ = row_flags_ + num_slots;
    row_at_ = col_flags_ + num_slots;
  }

  // The columns `first_column` ... of an influence matrix (H + 1, columns) through the segments start ... end - 1.
  // Only rows that were written go back.
  __device__ void replay(const Ring<T>& ring, int64_t batch, int64_t stream, int64_t start, int64_t end, T* matrix,
                         int64_t columns, int64_t first_column) {
    const int lane = threadIdx.x % kColumns, first_row = threadIdx.x / kColumns;
    const bool inside = first_column + lane < columns;
    T* from = matrix + first_column + lane;
    for (int s = threadIdx.x; s < num_slots_; s += kThreads) row_flags_[s] = 0;
    for (int h = first_row; h <= hidden_; h += kRowsAtOnce) {
      tile_[h * kColumns + lane] = inside ? from[h * columns] : T{0};
    }
    if (first_row == 0) tile_[(hidden_ + 1) * kColumns + lane] = T{0};
    __syncthreads();
    for (int64_t t = start; t < end; ++t) apply(node_place(ring, batch, slot_size_, t, stream));
    for (int h = first_row; h <= hidden_; h += kRowsAtOnce) {
      if (inside && (h == hidden_ || row_flags_[h / slot_size_])) from[h * columns] = tile_[h * kColumns + lane];
    }
  }

  // The columns `first_column` ... of the product of the segments start ... end - 1 of one stream, from nodes up to a
  // level; `out` has room for its slots.
  __device__ void product(const Tree<T>& tree, int highest, int64_t stream, int64_t start, int64_t end,
                          const NodePlace<T>& out, int first_column) {
    for (int s = threadIdx.x; s < num_slots_; s += kThreads) {
      row_flags_[s] = col_flags_[s] = 0;
      row_at_[s] = -1;
    }
    for (int64_t position = start; position < end;) {
      const NodeId id = covering_node(position, end, highest);
      position += int64_t{1} << id.level;
      const NodePlace<T> node = node_place(tree.levels[id.level], tree.batch, slot_size_, id.index, stream);
      __syncthreads();
      load_slots(node, rows_, cols_);
      __syncthreads();
      for (int s = threadIdx.x; s < num_slots_; s += kThreads) {
        if (find_place(rows_, node.num_rows, s) >= 0) row_flags_[s] = 1;
        if (find_place(cols_, node.num_cols, s) >= 0) col_flags_[s] = 1;
      }
    }
    __syncthreads();
    int num_rows = list_slots(row_flags_, num_slots_, all_rows_);
    int num_cols = list_slots(col_flags_, num_slots_, all_cols_);
    __syncthreads();
    num_rows = num_rows < out.num_rows ? num_rows : out.num_rows;  // more would be a caller's mistake
    num_cols = num_cols < out.num_cols ? num_cols : out.num_cols;
    if (num_rows == 0) {  // a map without rows gets a row of the identity
      if (threadIdx.x == 0) {
        if (num_cols == 0) all_cols_[0] = 0;
        all_rows_[0] = all_cols_[num_cols > 0 ? num_cols - 1 : 0];
      }
      num_rows = 1;
      num_cols = num_cols > 0 ? num_cols : 1;
      __syncthreads();
    }
    const bool present = first_column < num_cols * slot_size_;  // other columns are repetitions, which hold zeros
    if (present) {
      int64_t position = start;
      if (start < end) {
        const NodeId id = covering_node(start, end, highest);
        position += int64_t{1} << id.level;
        load_node(node_place(tree.levels[id.level], tree.batch, slot_size_, id.index, stream), first_column, num_cols);
      } else {
        load_node({nullptr, nullptr, nullptr, nullptr, 0, 0}, first_column, num_cols);
      }
      while (position < end) {
        const NodeId id = covering_node(position, end, highest);
        position += int64_t{1} << id.level;
        apply(node_place(tree.levels[id.level], tree.batch, slot_size_, id.index, stream));
      }
    }
    const int lane = threadIdx.x % kColumns, first_row = threadIdx.x / kColumns, column = first_column + lane;
    const int width = out.num_cols * slot_size_, height = out.num_rows * slot_size_;
    if (column < width) {
      const bool holds = column < num_cols * slot_size_;
      for (int i = first_row; i < height; i += kRowsAtOnce) {
        const int s = i / slot_size_ < num_rows ? i / slot_size_ : num_rows - 1;  // repeated rows are copies
        const int h = all_rows_[s] * slot_size_ + i % slot_size_;
        out.blocks[static_cast<int64_t>(i) * width + column] = holds ? tile_[h * kColumns + lane] : T{0};
      }
      if (first_row == 0) out.loss_row[column] = holds ? tile_[hidden_ * kColumns + lane] : T{0};
    }
    if (first_column == 0) {
      for (int i = threadIdx.x; i < out.num_rows; i += kThreads) out.rows[i] = all_rows_[i < num_rows ? i : num_rows - 1];
      for (int i = threadIdx.x; i < out.num_cols; i += kThreads) out.cols[i] = all_cols_[i < num_cols ? i : num_cols - 1];
    }
  }

 private:
  static constexpr __host__ __device__ int64_t padded(int64_t size) { return (size + kDepth - 1) / kDepth * kDepth; }

  // Columns of a node as a matrix of the whole state, of the columns that belong to the slots all_cols_[0 ... num_cols).
  __device__ void load_node(const NodePlace<T>& node, int first_column, int num_cols) {
    load_slots(node, rows_, cols_);
    __syncthreads();
    for (int s = threadIdx.x; s < num_slots_; s += kThreads) row_at_[s] = find_place(rows_, node.num_rows, s);
    __syncthreads();
    const int lane = threadIdx.x % kColumns, first_row = threadIdx.x / kColumns;
    const int place = (first_column + lane) / slot_size_, x = (first_column + lane) % slot_size_;
    const int slot = place < num_cols ? all_cols_[place] : -1;
    const int col = slot < 0 ? -1 : find_place(cols_, node.num_cols, slot);
    const int width = node.num_cols * slot_size_;
    for (int h = first_row; h < hidden_; h += kRowsAtOnce) {
      const int s = h / slot_size_, d = h % slot_size_, row = row_at_[s];
      T value = T{0};
      if (row < 0) {
        value = s == slot && d == x ? T{1} : T{0};
      } else if (col >= 0) {
        value = node.blocks[static_cast<int64_t>(row * slot_size_ + d) * width + col * slot_size_ + x];
      }
      tile_[h * kColumns + lane] = value;
    }
    if (first_row == 0) {
      tile_[hidden_ * kColumns + lane] = col >= 0 ? node.loss_row[col * slot_size_ + x] : T{0};
      tile_[(hidden_ + 1) * kColumns + lane] = T{0};
    }
    __syncthreads();
  }

  // The tile through one node. All reads of the tile precede its writes; barriers stand before and behind.
  __device__ void apply(const NodePlace<T>& node) {
    load_slots(node, rows_, cols_);
    __syncthreads();
    const int w = distinct(rows_, node.num_rows) * slot_size_, r = distinct(cols_, node.num_cols) * slot_size_;
    const int width = node.num_cols * slot_size_, depth = static_cast<int>(padded(r));
    // Rows of the tile that the node's columns stand for; those that pad the depth are the row of zeros.
    for (int k = threadIdx.x; k < depth; k += kThreads) {
      source_[k] = (k < r ? cols_[k / slot_size_] * slot_size_ + k % slot_size_ : hidden_ + 1) * kColumns;
    }
    __syncthreads();
    add_loss_row(node.loss_row, r);
    for (int first = 0; first < w; first += kPanel) panel(node.blocks, width, first, w, r, depth);
    __syncthreads();
    for (int i = threadIdx.x / kColumns; i < w; i += kRowsAtOnce) {
      const int slot = rows_[i / slot_size_], lane = threadIdx.x % kColumns;
      tile_[(slot * slot_size_ + i % slot_size_) * kColumns + lane] = staged_[i * kColumns + lane];
      if (lane == 0 && i % slot_size_ == 0) row_flags_[slot] = 1;
    }
    __syncthreads();
  }

  // loss += u tile[source], every column split into kRowsAtOnce parts that are added in order.
  __device__ void add_loss_row(const T* u, int r) {
    const int lane = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
    T sum = T{0};
    for (int k = part; k < r; k += kRowsAtOnce) sum += u[k] * tile_[source_[k] + lane];
    left_[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0) {
      sum = tile_[hidden_ * kColumns + lane];
      for (int i = 0; i < kRowsAtOnce; ++i) sum += left_[i * kColumns + lane];
      tile_[hidden_ * kColumns + lane] = sum;
    }
    __syncthreads();
  }

  // Rows first ... first + kPanel - 1 of blocks times tile[source], to `staged_`.
  __device__ __forceinline__ void panel(const T* blocks, int width, int first, int w, int r, int depth) {
    const int tx = threadIdx.x % kColumnThreads, ty = threadIdx.x / kColumnThreads;
    T sums[kRowsPerThread][kColumnsPerThread];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int x = 0; x < kColumnsPerThread; ++x) sums[i][x] = T{0};
    }
    T next[kLoads];  // of the left factor, under way while the numbers before are used
    load_left(blocks, width, first, w, 0, r, next);
    for (int k0 = 0; k0 < depth; k0 += kDepth) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) left_[left_column(j) * kLeftStride + left_row(j)] = next[j];
      __syncthreads();
      if (k0 + kDepth < depth) load_left(blocks, width, first, w, k0 + kDepth, r, next);
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        const auto a = *reinterpret_cast<const Pack<T, kRowsPerThread>*>(left_ + k * kLeftStride + ty * kRowsPerThread);
        const auto b =
            *reinterpret_cast<const Pack<T, kColumnsPerThread>*>(tile_ + source_[k0 + k] + tx * kColumnsPerThread);
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
          for (int x = 0; x < kColumnsPerThread; ++x) sums[i][x] += a.values[i] * b.values[x];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int row = first + ty * kRowsPerThread + i;
      if (row >= w) continue;
#pragma unroll
      for (int x = 0; x < kColumnsPerThread; ++x) {
        staged_[row * kColumns + tx * kColumnsPerThread + x] = sums[i][x];
      }
    }
  }

  // Which number of the left factor a thread stages: a warp takes 8 columns of 4 rows, so that every sector of memory
  // is used and the stores fall on different banks.
  __device__ __forceinline__ static int left_column(int j) { return threadIdx.x % 8 + 8 * (j % 2); }
  __device__ __forceinline__ static int left_row(int j) { return threadIdx.x / 8 + kThreads / 8 * (j / 2); }

  __device__ __forceinline__ static void load_left(const T* blocks, int width, int first, int w, int k0, int r,
                                                   T* next) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int row = first + left_row(j), k = k0 + left_column(j);
      next[j] = row < w && k < r ? blocks[static_cast<int64_t>(row) * width + k] : T{0};
    }
  }

  int num_slots_, slot_size_, hidden_;
  T* left_;             // (kDepth, kLeftStride)
  T* tile_;             // (H + 2, kColumns): state, loss row, zeros
  T* staged_;           // (R * D, kColumns): new rows
  int32_t* source_;     // (H padded,): offsets into the tile
  int32_t* rows_;       // (S,): of the node at hand
  int32_t* cols_;       // (S,)
  int32_t* all_rows_;   // (S,): of the product
  int32_t* all_cols_;   // (S,)
  int32_t* row_flags_;  // (S,): slots that were written
  int32_t* col_flags_;  // (S,)
  int32_t* row_at_;     // (S,)
};

// Column tiles, at least one: the slot sets of a product are written even if it has no columns.
template <int kColumns>
__host__ __device__ inline int64_t column_tiles(int64_t columns) {
  return columns > kColumns ? (columns + kColumns - 1) / kColumns : 1;
}

// First segment of a suffix that can be in the ring, whatever the start.
__device__ __forceinline__ int64_t kept_start(int64_t start, int64_t count, int64_t capacity) {
  const int64_t oldest = count > capacity ? count - capacity : 0;
  return start < oldest ? oldest : start;
}

// Bytes of shared memory of `write_leaf`.
inline size_t leaf_shared_bytes(int64_t num_slots, int64_t num_write, int64_t num_support) {
  return sizeof(int32_t) * (4 * num_slots + num_write + num_support);
}

// The leaf of the segment that is appended; one thread block per (row slot, stream).
template <typename T>
__device__ void write_leaf(const TreeAppend<T>& a, unsigned char* memory) {
  const Tree<T>& tree = a.tree;
  const int S = static_cast<int>(tree.num_slots), D = static_cast<int>(tree.slot_size);
  const int kw = static_cast<int>(a.num_write), ks = static_cast<int>(a.num_support);
  const int64_t stream = blockIdx.x / tree.levels[0].num_rows;
  const int place = static_cast<int>(blockIdx.x % tree.levels[0].num_rows);
  const NodePlace<T> leaf = node_place(tree.levels[0], tree.batch, D, *a.count, stream);
  int32_t* row_flags = reinterpret_cast<int32_t*>(memory);
  int32_t* col_flags = row_flags + S;
  int32_t* rows = col_flags + S;
  int32_t* cols = rows + S;
  int32_t* write = cols + S;
  int32_t* support = write + kw;
  for (int i = threadIdx.x; i < kw; i += kThreads) write[i] = static_cast<int32_t>(a.write[stream * kw + i]);
  for (int i = threadIdx.x; i < ks; i += kThreads) support[i] = static_cast<int32_t>(a.support[stream * ks + i]);
  __syncthreads();
  for (int s = threadIdx.x; s < S; s += kThreads) {
    row_flags[s] = col_flags[s] = 0;
    for (int i = 0; i < kw; ++i) {
      if (write[i] == s) row_flags[s] = 1;
    }
    for (int j = 0; j < ks; ++j) {
      if (support[j] == s) col_flags[s] = 1;
    }
  }
  __syncthreads();
  const int num_rows = list_slots(row_flags, S, rows);
  const int num_cols = list_slots(col_flags, S, cols);
  __syncthreads();
  // Where there are no rows, one of the identity; repeated rows are copies.
  const int last_col = num_cols > 0 ? num_cols - 1 : 0;
  const int identity = num_cols > 0 ? cols[last_col] : 0;
  const int row = num_rows == 0 ? identity : rows[place < num_rows ? place : num_rows - 1];
  int at = 0;
  while (num_rows > 0 && write[at] != row) ++at;
  const int width = leaf.num_cols * D;
  const T* Jh = a.Jh + (stream * kw + at) * D * ks * D;
  for (int i = threadIdx.x; i < D * width; i += kThreads) {
    const int d = i / width, c = i % width / D, x = i % D;
    T sum = T{0};
    if (num_rows == 0) {
      sum = c == last_col && d == x ? T{1} : T{0};
    } else if (c < num_cols) {
      for (int j = 0; j < ks; ++j) {
        if (support[j] == cols[c]) sum += Jh[static_cast<int64_t>(d) * ks * D + j * D + x];
      }
    }
    leaf.blocks[static_cast<int64_t>(place) * D * width + i] = sum;
  }
  if (threadIdx.x == 0) leaf.rows[place] = row;
  if (place > 0) return;
  for (int c = threadIdx.x; c < leaf.num_cols; c += kThreads) {
    leaf.cols[c] = num_cols > 0 ? cols[c < num_cols ? c : last_col] : 0;
  }
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const int c = i / D, x = i % D;
    const bool held = a.loss_row != nullptr && c < num_cols;
    leaf.loss_row[i] = held ? a.loss_row[(stream * S + cols[c]) * D + x] : T{0};
  }
}

// The node of one level that the append completes, if it does; one thread block per (column tile, stream).
template <typename T, int kColumns>
__device__ void merge_level(const TreeAppend<T>& a, int level, unsigned char* memory) {
  const Tree<T>& tree = a.tree;
  const int64_t end = *a.count + 1;
  if (level > completed_levels(end, a.first, tree.highest)) return;
  const int64_t tiles = column_tiles<kColumns>(tree.levels[level].num_cols * tree.slot_size);
  const int64_t stream = blockIdx.x / tiles, index = (end >> level) - 1;
  ColumnTile<T, kColumns> tile(memory, static_cast<int>(tree.num_slots), static_cast<int>(tree.slot_size),
                               static_cast<int>(tree.levels[level - 1].num_rows));
  tile.product(tree, level - 1, stream, index << level, end,
               node_place(tree.levels[level], tree.batch, tree.slot_size, index, stream),
               static_cast<int>(blockIdx.x % tiles) * kColumns);
}

// One thread block per (column tile, product).
template <typename T, int kColumns>
__device__ void suffix_product(const SuffixProduct<T>& p, unsigned char* memory) {
  const Tree<T>& tree = p.tree;
  const int64_t end = *p.count, D = tree.slot_size;
  const int64_t tiles = column_tiles<kColumns>(p.num_cols * D), q = blockIdx.x / tiles;
  const NodePlace<T> out{p.rows + q * p.num_rows,
                         p.cols + q * p.num_cols,
                         p.blocks + q * p.num_rows * D * p.num_cols * D,
                         p.loss_rows + q * p.num_cols * D,
                         static_cast<int>(p.num_rows),
                         static_cast<int>(p.num_cols)};
  ColumnTile<T, kColumns> tile(memory, static_cast<int>(tree.num_slots), static_cast<int>(D),
                               static_cast<int>(tree.levels[tree.highest].num_rows));
  tile.product(tree, tree.highest, p.streams[q], kept_start(p.starts[q], end, tree.levels[0].length), end, out,
               static_cast<int>(blockIdx.x % tiles) * kColumns);
}

// One thread block per (column tile, matrix), the tiles of a matrix side by side.
template <typename T, int kColumns>
__device__ void catch_up(const CatchUp<T>& c, unsigned char* memory) {
  const int64_t tiles = column_tiles<kColumns>(c.columns), matrix = blockIdx.x / tiles;
  const int64_t end = *c.count, start = kept_start(c.starts[matrix], end, c.ring.length);
  if (start >= end || c.groups[matrix] < 0) return;
  const int64_t hidden = c.rows_per_matrix - 1;
  ColumnTile<T, kColumns> tile(memory, static_cast<int>(hidden / c.slot_size), static_cast<int>(c.slot_size),
                               static_cast<int>(c.ring.num_rows));
  tile.replay(c.ring, c.batch, c.streams[matrix], start, end, c.P + c.groups[matrix] * c.rows_per_matrix * c.columns,
              c.columns, blockIdx.x % tiles * kColumns);
}

// Bytes of shared memory of `suffix_loss_rows`.
template <typename T>
inline size_t sweep_shared_bytes(int64_t hidden, int64_t num_rows, int64_t num_cols, int64_t slot_size) {
  const int64_t parts = kSweepThreads / kSweepColumns;
  return sizeof(T) * (hidden + parts * num_cols * slot_size) + sizeof(int32_t) * (num_rows + num_cols + kSweepThreads);
}

// One thread block per stream, backwards through the segments.
template <typename T>
__device__ void suffix_loss_rows(const SuffixLossRows<T>& s, unsigned char* memory) {
  constexpr int kParts = kSweepThreads / kSweepColumns;
  const int hidden = static_cast<int>(s.hidden), D = static_cast<int>(s.slot_size);
  const int64_t stream = blockIdx.x, end = *s.count;
  const int64_t* starts = s.starts + stream * s.experts;
  T* out = s.out + stream * s.experts * hidden;
  const int width = static_cast<int>(s.ring.num_cols) * D;
  T* v = reinterpret_cast<T*>(memory);  // (H,)
  T* sums = v + hidden;                 // (kParts, C * D)
  int32_t* rows = reinterpret_cast<int32_t*>(sums + kParts * width);
  int32_t* cols = rows + s.ring.num_rows;
  int32_t* gaps = cols + s.ring.num_cols;  // (kSweepThreads,)
  // The longest gap, found by one thread from those that each thread found.
  int64_t gap = 0;
  for (int64_t e = threadIdx.x; e < s.experts; e += kSweepThreads) {
    const int64_t start = kept_start(starts[e], end, s.ring.length);
    if (end - start > gap) gap = end - start;
  }
  gaps[threadIdx.x] = static_cast<int32_t>(gap);
  for (int h = threadIdx.x; h < hidden; h += kSweepThreads) v[h] = s.newest[stream * hidden + h];
  __syncthreads();
  for (int i = 0; i < kSweepThreads; ++i) gap = gaps[i] > gap ? gaps[i] : gap;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = threadIdx.x % kSweepColumns, part = threadIdx.x / kSweepColumns;
  for (int64_t t = end;; --t) {
    // `v` is the vector behind segment t - 1: what a suffix from t on gives.
    for (int64_t e = warp; e < s.experts; e += kSweepThreads / 32) {
      const int64_t start = kept_start(starts[e], end, s.ring.length);
      if (start != t && !(t == end && start > end)) continue;
      for (int h = lane; h < hidden; h += 32) out[e * hidden + h] = v[h];
    }
    if (t == end - gap) return;
    const NodePlace<T> node = node_place(s.ring, s.batch, D, t - 1, stream);
    load_slots(node, rows, cols);
    __syncthreads();
    const int w = distinct(rows, node.num_rows) * D, r = distinct(cols, node.num_cols) * D;
    for (int x = column; x < r; x += kSweepColumns) {
      T sum = part == 0 ? node.loss_row[x] : T{0};
      for (int i = part; i < w; i += kParts) {
        sum += v[rows[i / D] * D + i % D] * node.blocks[static_cast<int64_t>(i) * width + x];
      }
      sums[part * width + x] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < w; i += kSweepThreads) v[rows[i / D] * D + i % D] = T{0};
    __syncthreads();
    for (int x = threadIdx.x; x < r; x += kSweepThreads) {
      T sum = v[cols[x / D] * D + x % D];
      for (int i = 0; i < kParts; ++i) sum += sums[i * width + x];
      v[cols[x / D] * D + x % D] = sum;
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_CUDA_TREE_KERNELS_CUH_
