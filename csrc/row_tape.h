// The row tape: what takes row vectors back through a step, as a list of two instructions.
#ifndef SPARSE_RTRL_ROW_TAPE_H_
#define SPARSE_RTRL_ROW_TAPE_H_

#include <cstdint>

namespace sparse_rtrl {

// Numbers that an instruction reads: one line for all steps and streams, one for each step, or one for each of both.
template <typename T>
struct TapeOperand {
  const T* data = nullptr;
  int64_t step = 0;    // numbers from a step to the next
  int64_t stream = 0;  // numbers from a stream to the next
  const T* at(int64_t of_step, int64_t of_stream) const { return data + of_step * step + of_stream * stream; }
};

// An instruction on entries of w numbers each. A combination does out[dst[e]] += coefficient[e] entry[src[e]] for all
// entries e, after `rows` entries from `out` on were cleared; in a sorted one equal dst are neighbours and every row
// occurs, so that nothing need be cleared. A product does out[p, m] = sum_j entry[p, j] matrix[p / (P / matrices), j, m].
template <typename T>
struct TapeInstruction {
  bool product;
  int64_t out;
  int64_t rows;                // combination
  int64_t entries;             // combination
  TapeOperand<int32_t> dst;    // (entries,)
  TapeOperand<int32_t> src;    // (entries,)
  TapeOperand<T> coefficient;  // (entries,), or null
  bool sorted;                 // combination
  int64_t source;              // product
  int64_t positions;           // product: P
  int64_t matrices;            // product
  int64_t inner;               // product
  int64_t outer;               // product
  TapeOperand<T> matrix;       // (matrices, inner, outer)
};

// Entries of the workspace that are kept of every step, as (steps, G, count, w).
template <typename T>
struct Tap {
  int64_t row;
  int64_t count;
  T* out;
};

template <typename T>
struct RowsBack {
  T* v;                 // (G, w, H): behind the last step, then before the first
  const T* cotangents;  // (steps, B, H), added to the first row behind each step, or null
  int64_t batch;        // B
  int64_t stream;       // the first of the G streams that go back
  int64_t count;        // G
  int64_t width;        // w
  int64_t hidden;       // H
  int64_t steps;
  int64_t rows;         // entries of the workspace
  int64_t before;       // entry at which the row before the step stands
  const TapeInstruction<T>* instructions;
  int64_t num_instructions;
  const Tap<T>* taps;
  int64_t num_taps;
};

}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_ROW_TAPE_H_
