// The recurrence of SlotMoECell behind the operations of sparse_rtrl/ops.py, through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "tensor_checks.h"
#include "threads.h"

namespace sparse_rtrl {
namespace {

void check_number(const std::string& name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    throw std::invalid_argument(name + " must be from " + std::to_string(least) + " to " + std::to_string(most) +
                                ", got " + std::to_string(value));
  }
}

template <typename T>
T* writable(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Weights of the cell: slot table, key-value, control weight and bias, core, expert weight and bias; and its sizes.
struct CellTensors {
  std::vector<Tensor> weights;
  SlotMoeSizes sizes;

  CellTensors(const std::vector<Tensor>& given, int64_t batch, int64_t input, int64_t heads, int64_t read,
              int64_t write, int64_t top_k) {
    if (given.size() != 7) {
      throw std::invalid_argument("weights must be 7 tensors, got " + std::to_string(given.size()));
    }
    const Tensor& like = given[0];
    const ScalarType dtype = like.scalar_type();
    if (like.dim() != 2 || given[5].dim() != 3) fail("weights", "begin with a slot table (S, D)", like);
    const int64_t S = like.size(0), D = like.size(1), E = given[5].size(0);
    check_number("slot_size", D, 1, INT64_MAX);
    check_number("read_slots", read, 1, S);
    check_number("write_slots", write, 1, S);
    check_number("top_k", top_k, 1, E);
    check_number("num_heads", heads, 1, D);
    if (D % heads != 0) throw std::invalid_argument("num_heads must divide the slot size " + std::to_string(D));
    sizes = {batch, S, D, heads, read, write, E, top_k, input};
    weights.push_back(checked("weights", like, like, dtype, {S, D}));
    weights.push_back(checked("weights", given[1], like, dtype, {2 * D, D}));
    weights.push_back(checked("weights", given[2], like, dtype, {2 * D, D}));
    weights.push_back(checked("weights", given[3], like, dtype, {2 * D}));
    weights.push_back(checked("weights", given[4], like, dtype, {D, D}));
    weights.push_back(checked("weights", given[5], like, dtype, {E, D + 1, D}));
    weights.push_back(checked("weights", given[6], like, dtype, {E, D + 1}));
  }

  template <typename T>
  SlotMoeWeights<T> of() const {
    return {numbers<T>(weights[0]), numbers<T>(weights[1]), numbers<T>(weights[2]), numbers<T>(weights[3]),
            numbers<T>(weights[4]), numbers<T>(weights[5]), numbers<T>(weights[6])};
  }
};

// Steps as slot_moe_forward left them.
struct StepTensors {
  Tensor inputs, saved, index;
  CellTensors cell;
  SlotMoeColumns columns;

  StepTensors(const Tensor& inputs_, const Tensor& saved_, const Tensor& index_, const std::vector<Tensor>& weights,
              const std::vector<int64_t>& at, int64_t heads, int64_t read, int64_t write)
      : cell(weights, saved_.dim() == 3 ? saved_.size(1) : -1, inputs_.dim() == 3 ? inputs_.size(2) : -1, heads, read,
             write, index_.dim() == 3 ? index_.size(2) - read - write : 0) {
    const SlotMoeSizes& s = cell.sizes;
    const Tensor& like = cell.weights[0];
    const ScalarType dtype = like.scalar_type();
    saved = checked("saved", saved_, like, dtype, {-1, -1, s.saved()});
    const int64_t n = saved.size(0);
    inputs = checked("inputs", inputs_, like, dtype, {n, s.batch, -1});
    index = checked_indices("index", index_, like, {n, s.batch, s.indices()}, std::max(s.slots, s.experts));
    for (int64_t i = 0; i < index.numel(); ++i) {
      const bool slot = i % s.indices() < s.support();
      check_number("index", indices(index)[i], 0, (slot ? s.slots : s.experts) - 1);
    }
    if (at.size() != 9) {
      throw std::invalid_argument("columns must be 9 numbers, got " + std::to_string(at.size()));
    }
    columns = {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8]};
  }

  void check_columns(int64_t core, int64_t experts) const {
    const SlotMoeSizes& s = cell.sizes;
    const int64_t D = s.size;
    check_number("columns", columns.slot_table, 0, core - s.hidden());
    check_number("columns", columns.query_weight, 0, core - 2 * D * s.input);
    check_number("columns", columns.query_bias, 0, core - 2 * D);
    check_number("columns", columns.key_value, 0, core - 2 * D * D);
    check_number("columns", columns.control_weight, 0, core - 2 * D * D);
    check_number("columns", columns.control_bias, 0, core - 2 * D);
    check_number("columns", columns.core, 0, core - D * D);
    check_number("columns", columns.expert_weight, 0, experts - (D + 1) * D);
    check_number("columns", columns.expert_bias, 0, experts - (D + 1));
  }

  template <typename T>
  SlotMoeSteps<T> of() const {
    return {cell.sizes,         cell.of<T>(),       columns,       saved.size(0),
            numbers<T>(inputs), numbers<T>(saved), indices(index)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> slot_moe_forward(Tensor state, Tensor query_token,
                                                            std::vector<Tensor> weights, int64_t heads, int64_t read,
                                                            int64_t write, int64_t top_k) {
  const CellTensors cell(weights, state.dim() == 3 ? state.size(0) : -1, 0, heads, read, write, top_k);
  const SlotMoeSizes& s = cell.sizes;
  const Tensor& like = cell.weights[0];
  const ScalarType dtype = like.scalar_type();
  state = checked("state", state, like, dtype, {-1, s.slots, s.size});
  query_token = checked("query_token", query_token, like, dtype, {-1, s.batch, 2 * s.size});
  const int64_t n = query_token.size(0);
  Tensor new_state = torch::stable::clone(state);
  Tensor slots = torch::stable::new_empty(like, {n, s.batch, s.support(), s.size});
  Tensor saved = torch::stable::new_empty(like, {n, s.batch, s.saved()});
  Tensor index = torch::stable::new_empty(like, {n, s.batch, s.indices()}, ScalarType::Long);
  for_scalar_type("state", state, [&](auto scalar) {
    using T = decltype(scalar);
    kernels<T>().slot_moe_forward({s, cell.of<T>(), n, numbers<T>(query_token), writable<T>(new_state),
                                   writable<T>(slots), writable<T>(saved), writable<int64_t>(index)},
                                  kThreads);
  });
  return {new_state, slots, saved, index};
}

void slot_moe_pull_back_(Tensor v, Tensor core, Tensor experts, std::optional<Tensor> cotangent, Tensor inputs,
                         Tensor saved, Tensor index, std::vector<Tensor> weights, std::vector<int64_t> columns,
                         int64_t heads, int64_t read, int64_t write) {
  const StepTensors steps(inputs, saved, index, weights, columns, heads, read, write);
  const SlotMoeSizes& s = steps.cell.sizes;
  const Tensor& like = steps.cell.weights[0];
  const ScalarType dtype = like.scalar_type();
  v = checked_in_place("v", v, like, dtype, {s.batch, s.hidden()});
  core = checked_in_place("core", core, like, dtype, {-1});
  experts = checked_in_place("experts", experts, like, dtype, {s.experts, -1});
  steps.check_columns(core.size(0), experts.size(1));
  if (cotangent.has_value()) {
    cotangent = checked("cotangent", *cotangent, like, dtype, {saved.size(0), s.batch, s.support(), s.size});
  }
  for_scalar_type("v", v, [&](auto scalar) {
    using T = decltype(scalar);
    kernels<T>().slot_moe_pull_back(
        {steps.of<T>(), writable<T>(v), cotangent.has_value() ? numbers<T>(*cotangent) : nullptr, writable<T>(core),
         writable<T>(experts), core.size(0), experts.size(1)},
        kThreads);
  });
}

void slot_moe_transfer_(Tensor phi, Tensor inputs, Tensor saved, Tensor index, std::vector<Tensor> weights,
                        std::vector<int64_t> columns, int64_t heads, int64_t read, int64_t write) {
  const StepTensors steps(inputs, saved, index, weights, columns, heads, read, write);
  const SlotMoeSizes& s = steps.cell.sizes;
  const Tensor& like = steps.cell.weights[0];
  phi = checked_in_place("phi", phi, like, like.scalar_type(), {s.batch, -1, s.hidden()});
  if (phi.size(1) == 0) return;
  for_scalar_type("phi", phi, [&](auto scalar) {
    using T = decltype(scalar);
    kernels<T>().slot_moe_transfer({steps.of<T>(), writable<T>(phi), phi.size(1)}, kThreads);
  });
}

void slot_moe_commit_(Tensor core, Tensor experts, Tensor phi, Tensor rows, Tensor inputs, Tensor saved, Tensor index,
                      std::vector<Tensor> weights, std::vector<int64_t> columns, int64_t heads, int64_t read,
                      int64_t write) {
  const StepTensors steps(inputs, saved, index, weights, columns, heads, read, write);
  const SlotMoeSizes& s = steps.cell.sizes;
  const Tensor& like = steps.cell.weights[0];
  const ScalarType dtype = like.scalar_type();
  core = checked_in_place("core", core, like, dtype, {s.batch, s.hidden() + 1, -1});
  experts = checked_in_place("experts", experts, like, dtype, {s.batch * s.experts, s.hidden() + 1, -1});
  phi = checked_in_place("phi", phi, like, dtype, {s.batch, -1, s.hidden()});
  rows = checked_indices("rows", rows, like, {s.batch, phi.size(1)}, s.hidden());
  steps.check_columns(core.size(2), experts.size(2));
  if (phi.size(1) == 0) return;
  for_scalar_type("core", core, [&](auto scalar) {
    using T = decltype(scalar);
    kernels<T>().slot_moe_commit({{steps.of<T>(), writable<T>(phi), phi.size(1)},
                                  indices(rows),
                                  writable<T>(core),
                                  writable<T>(experts),
                                  core.size(2),
                                  experts.size(2)},
                                 kThreads);
  });
}

}  // namespace
}  // namespace sparse_rtrl

STABLE_TORCH_LIBRARY_IMPL(sparse_rtrl, CPU, m) {
  m.impl("slot_moe_forward", TORCH_BOX(&sparse_rtrl::slot_moe_forward));
  m.impl("slot_moe_pull_back_", TORCH_BOX(&sparse_rtrl::slot_moe_pull_back_));
  m.impl("slot_moe_transfer_", TORCH_BOX(&sparse_rtrl::slot_moe_transfer_));
  m.impl("slot_moe_commit_", TORCH_BOX(&sparse_rtrl::slot_moe_commit_));
}
