// The recurrence of SlotMoECell (sparse_rtrl/cells/slot_moe.py), free of torch: sizes, what a step leaves behind, and
// the arguments of its kernels. A step's equations stand in the docstring of the cell.
#ifndef SPARSE_RTRL_SLOT_MOE_H_
#define SPARSE_RTRL_SLOT_MOE_H_

#include <cstdint>

namespace sparse_rtrl {

struct SlotMoeSizes {
  int64_t batch;    // B
  int64_t slots;    // S
  int64_t size;     // D
  int64_t heads;    // attention heads, a divisor of D
  int64_t read;     // kr
  int64_t write;    // kw
  int64_t experts;  // E
  int64_t top_k;    // k
  int64_t input;    // I
  bool softmax;     // over the read slots, instead of sigmoid weights

  int64_t hidden() const { return slots * size; }
  int64_t support() const { return read + write; }

  // Indices of a step: read (kr), write (kw), experts (k).
  int64_t indices() const { return read + write + top_k; }

  // What a step saves for the backward pass, one row of numbers.
  int64_t mixed() const { return 0; }                                 // (D): z, the input of controls and experts
  int64_t slots_seen() const { return size; }                         // (kr + kw, D): old content plus identity
  int64_t old_write() const { return slots_seen() + support() * size; }  // (kw, D): old content of the written slots
  int64_t query() const { return old_write() + write * size; }        // (D)
  int64_t write_query() const { return query() + size; }              // (D)
  int64_t key_value() const { return write_query() + size; }          // (kr, 2 D)
  int64_t attention() const { return key_value() + read * 2 * size; }  // (kr, heads): weights of the read slots
  int64_t expert_outputs() const { return attention() + read * heads; }  // (k, D + 1): m_e, and the sigmoid of r_e
  int64_t gate() const { return expert_outputs() + top_k * (size + 1); }  // (kw, D)
  int64_t candidate() const { return gate() + write * size; }         // (kw, D)
  int64_t saved() const { return candidate() + write * size; }

  // Cotangents of the maps of a step for one row, side by side.
  int64_t d_query_token() const { return 0; }                           // (2 D)
  int64_t d_key_value() const { return 2 * size; }                      // (kr, 2 D)
  int64_t d_control() const { return d_key_value() + read * 2 * size; }  // (2 D)
  int64_t d_experts() const { return d_control() + 2 * size; }          // (k, D + 1)
  int64_t d_core() const { return d_experts() + top_k * (size + 1); }   // (kw, D)
  int64_t d_identity() const { return d_core() + write * size; }        // (kr + kw, D)
  int64_t cotangents() const { return d_identity() + support() * size; }
};

// First columns of the parameters in the influence matrices of their groups.
struct SlotMoeColumns {
  int64_t slot_table, query_weight, query_bias, key_value, control_weight, control_bias, core;
  int64_t expert_weight, expert_bias;
};

// Weights as the steps used them, each with its output as the first dimension.
template <typename T>
struct SlotMoeWeights {
  const T* slot_table;      // (S, D)
  const T* key_value;       // (2 D, D)
  const T* control_weight;  // (2 D, D)
  const T* control_bias;    // (2 D,)
  const T* core;            // (D, D)
  const T* expert_weight;   // (E, D + 1, D)
  const T* expert_bias;     // (E, D + 1)
};

template <typename T>
struct SlotMoeForward {
  SlotMoeSizes sizes;
  SlotMoeWeights<T> weights;
  bool least_used;       // written are the slots of smallest content, not those of largest importance
  int64_t steps;         // n
  const T* query_token;  // (n, B, 2 D): the linear map of the inputs
  T* state;              // (B, H), in place
  T* slots;              // (n, B, kr + kw, D): old content of the read slots, new content of the written ones
  T* saved;              // (n, B, saved())
  int64_t* index;        // (n, B, indices())
};

// A step as slot_moe_forward left it.
template <typename T>
struct SlotMoeStep {
  const T* inputs;       // (B, I)
  const T* saved;        // (B, saved())
  const int64_t* index;  // (B, indices())
  int64_t weights;       // which of SlotMoeSteps::weights it was run with
};

// Consecutive steps, and all the weights that they were run with.
template <typename T>
struct SlotMoeSteps {
  SlotMoeSizes sizes;
  SlotMoeColumns columns;
  const SlotMoeStep<T>* step;  // (n,)
  int64_t steps;               // n
  const SlotMoeWeights<T>* weights;
  int64_t num_weights;

  const T* saved(int64_t t, int64_t b) const { return step[t].saved + b * sizes.saved(); }
  const int64_t* index(int64_t t, int64_t b) const { return step[t].index + b * sizes.indices(); }
};

// One row per stream back through the steps, with the gradient of the parameters.
template <typename T>
struct SlotMoePullBack {
  SlotMoeSteps<T> of;
  T* v;                  // (B, H): dL/dh behind the last step in, before the first one out
  const T* cotangent;    // (n, B, kr + kw, D): dL/d slots of each step, or null
  T* core;               // (N_core,), added to
  T* experts;            // (E, N_expert), added to
  int64_t core_columns;
  int64_t expert_columns;
};

// Many rows per stream back through the steps: phi <- phi dh_end/dh_entry.
template <typename T>
struct SlotMoeTransfer {
  SlotMoeSteps<T> of;
  T* phi;        // (B, R, H)
  int64_t rows;  // R
};

// As SlotMoeTransfer, and adds phi F to the influence matrices on the way.
template <typename T>
struct SlotMoeCommit {
  SlotMoeTransfer<T> transfer;
  const int64_t* state_rows;  // (B, R): rows of the influence matrices
  T* core;                    // (B, H + 1, N_core)
  T* experts;                 // (B * E, H + 1, N_expert)
  int64_t core_columns;
  int64_t expert_columns;
};

}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_SLOT_MOE_H_
