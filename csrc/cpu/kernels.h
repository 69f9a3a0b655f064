// The CPU kernels, free of torch: one table of functions per instruction set and scalar type, chosen at run time.
#ifndef SPARSE_RTRL_CPU_KERNELS_H_
#define SPARSE_RTRL_CPU_KERNELS_H_

#include <cstdint>

#include "../rings.h"
#include "../row_tape.h"
#include "../slot_moe.h"

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

// P <- decay P + delta z, and before that g += sum over streams of u conj(P). Complex numbers are pairs of real ones
// throughout, except in z; sizes count entries, not numbers. A loss alone has neither decay, delta nor z.
template <typename T>
struct DiagonalUpdate {
  T* P;             // (B, R, J); a loss alone only reads it
  const T* decay;   // (B, R)
  const T* delta;   // (B, R, tau)
  const T* z;       // (B, tau, J), real
  T* g;             // (R, J), or null
  const T* u;       // (B, R), or null
  int64_t batch;    // B
  int64_t rows;     // R
  int64_t columns;  // J
  int64_t tau;
  bool complex_numbers;
};

template <typename T>
struct Kernels {
  const char* name;
  void (*influence_update)(const InfluenceUpdate<T>&, const Parallel&);
  void (*loss_row)(const LossRow<T>&, const Parallel&);
  void (*tree_append)(const TreeAppend<T>&, const Parallel&);
  void (*suffix_product)(const SuffixProduct<T>&, const Parallel&);
  void (*catch_up)(const CatchUp<T>&, const Parallel&);
  void (*suffix_loss_rows)(const SuffixLossRows<T>&, const Parallel&);
  void (*slot_moe_forward)(const SlotMoeForward<T>&, const Parallel&);
  void (*slot_moe_pull_back)(const SlotMoePullBack<T>&, const Parallel&);
  void (*slot_moe_transfer)(const SlotMoeTransfer<T>&, const Parallel&);
  void (*slot_moe_commit)(const SlotMoeCommit<T>&, const Parallel&);
  void (*rows_back)(const RowsBack<T>&, const Parallel&);
  void (*diagonal_update)(const DiagonalUpdate<T>&, const Parallel&);
  void (*diagonal_loss)(const DiagonalUpdate<T>&, const Parallel&);
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
