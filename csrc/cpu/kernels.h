// The CPU kernels, free of torch: one table of functions per instruction set and scalar type, chosen at run time.
#ifndef SPARSE_RTRL_CPU_KERNELS_H_
#define SPARSE_RTRL_CPU_KERNELS_H_

#include <cstdint>

#include "../block_sparse.h"

namespace sparse_rtrl {

// How kernels run tasks 0 ... count - 1 on threads: `run` calls `body(context, begin, end)` on disjoint ranges of at
// least `grain` tasks.
struct Parallel {
  void (*run)(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

// One parameter's factored immediate Jacobian: F[i, offset + m * J + j] = sum_t delta[i, t, m] z[t, j].
template <typename T>
struct ImmediateTerm {
  const T* delta;  // (M, w, tau, m)
  const T* z;      // (M, tau, J)
  int64_t tau;
  int64_t m;
  int64_t j;       // J
  int64_t offset;  // first column
};

// P[write] <- Jh P[support] + F and P[H] += u P[support], for some influence matrices, in place.
template <typename T>
struct InfluenceUpdate {
  T* P;                     // (G, H + 1, N)
  int64_t rows_per_matrix;  // H + 1
  int64_t columns;          // N
  const T* Jh;              // (B, kw * D, ks * D)
  const int64_t* write;     // (B, kw)
  const int64_t* support;   // (B, ks)
  const T* loss_row;        // u, (B, ks * D), or null
  int64_t batch;            // B
  int64_t num_write;        // kw
  int64_t num_support;      // ks
  int64_t slot_size;        // D
  const int64_t* streams;   // (M,)
  const int64_t* groups;    // (M,), distinct
  int64_t count;            // M
  const ImmediateTerm<T>* terms;
  int64_t num_terms;
};

// P[g, H] += u P[g, :H].
template <typename T>
struct LossRow {
  T* P;                     // (G, H + 1, N)
  int64_t rows_per_matrix;  // H + 1
  int64_t columns;          // N
  const T* u;               // (M, H)
  const int64_t* groups;    // (M,), distinct
  int64_t count;            // M
};

// One batch of maps, a view per stream at regular distances.
template <typename T>
struct NodeBatch {
  const int64_t* rows;  // (B, R)
  const int64_t* cols;  // (B, C)
  const T* blocks;      // (B, R * D, C * D)
  const T* loss_row;    // (B, C * D)
  int64_t num_rows;     // R
  int64_t num_cols;     // C
  int64_t slot_size;    // D

  BlockSparseView<T> stream(int64_t b) const {
    return {rows + b * num_rows,
            cols + b * num_cols,
            blocks + b * num_rows * num_cols * slot_size * slot_size,
            loss_row + b * num_cols * slot_size,
            num_rows,
            num_cols,
            slot_size};
  }
};

// Where products go: room for R' = num_rows and C' = num_cols slots, filled up as BlockSparseView says.
template <typename T>
struct NodeOutput {
  int64_t* rows;  // (Q, R')
  int64_t* cols;  // (Q, C')
  T* blocks;      // (Q, R' * D, C' * D)
  T* loss_row;    // (Q, C' * D)
  int64_t num_rows;
  int64_t num_cols;
};

// Products of nodes along paths, one per pair (stream, path); a merge is a path of two.
template <typename T>
struct SuffixProduct {
  const NodeBatch<T>* nodes;  // distinct nodes
  const int64_t* streams;     // (Q,)
  const int64_t* paths;       // (Q, depth): indices of nodes, oldest first, -1 for none
  int64_t count;              // Q
  int64_t depth;
  int64_t num_slots;  // S
  int64_t slot_size;  // D
  NodeOutput<T> out;
};

// Influence matrices through the nodes of their paths, one after the other, each column tile read and written once.
template <typename T>
struct CatchUp {
  T* P;                       // (G, H + 1, N)
  int64_t rows_per_matrix;    // H + 1
  int64_t columns;            // N
  const NodeBatch<T>* nodes;  // distinct nodes
  int64_t num_nodes;
  int64_t batch;           // B
  const int64_t* streams;  // (M,)
  const int64_t* groups;   // (M,), distinct
  const int64_t* first;    // (M,): node that the matrix starts from; it goes through all nodes from there on
  int64_t count;           // M
  int64_t slot_size;       // D
};

// Loss rows of many suffixes of consecutive nodes in one backward sweep.
template <typename T>
struct SuffixLossRows {
  const NodeBatch<T>* nodes;  // consecutive segments, oldest first
  int64_t num_nodes;
  const int64_t* starts;  // (B, E): number of the node that the suffix starts from; num_nodes for none
  const T* newest;        // row vector at the end, (B, H)
  T* out;                 // (B, E, H)
  int64_t batch;          // B
  int64_t experts;        // E
  int64_t hidden;         // H
};

template <typename T>
struct Kernels {
  const char* name;
  void (*influence_update)(const InfluenceUpdate<T>&, const Parallel&);
  void (*loss_row)(const LossRow<T>&, const Parallel&);
  void (*suffix_product)(const SuffixProduct<T>&, const Parallel&);
  void (*catch_up)(const CatchUp<T>&, const Parallel&);
  void (*suffix_loss_rows)(const SuffixLossRows<T>&, const Parallel&);
};

namespace generic {
template <typename T>
const Kernels<T>& table();
}
namespace avx2 {
template <typename T>
const Kernels<T>& table();
}
namespace avx512 {
template <typename T>
const Kernels<T>& table();
}

// The kernels for this processor; the environment variable SPARSE_RTRL_CPU (generic, avx2 or avx512) lowers the choice.
// Throws std::runtime_error on an unknown name or one that the processor cannot run.
template <typename T>
const Kernels<T>& kernels();

}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_CPU_KERNELS_H_
