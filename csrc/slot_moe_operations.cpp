// The recurrence of SlotMoECell behind the operations of sparse_rtrl/ops/dispatch.py, through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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
              int64_t write, int64_t top_k, bool softmax) {
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
    sizes = {batch, S, D, heads, read, write, E, top_k, input, softmax};
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

// A window of segments as slot_moe_forward left them, each with its own weights.
struct WindowTensors {
  std::vector<Tensor> inputs, saved, index;
  std::vector<CellTensors> cells;
  SlotMoeColumns columns;
  int64_t steps = 0;

  WindowTensors(const std::vector<Tensor>& inputs_, const std::vector<Tensor>& saved_,
                const std::vector<Tensor>& index_, const std::vector<Tensor>& weights, const std::vector<int64_t>& at,
                int64_t heads, int64_t read, int64_t write, bool softmax) {
    const size_t count = inputs_.size();
    if (count == 0 || saved_.size() != count || index_.size() != count || weights.size() != 7 * count) {
      throw std::invalid_argument("inputs, saved, index and weights must hold 1, 1, 1 and 7 tensors per segment, got " +
                                  std::to_string(count) + ", " + std::to_string(saved_.size()) + ", " +
                                  std::to_string(index_.size()) + " and " + std::to_string(weights.size()));
    }
    const int64_t batch = saved_[0].dim() == 3 ? saved_[0].size(1) : -1;
    const int64_t input = inputs_[0].dim() == 3 ? inputs_[0].size(2) : -1;
    const int64_t top_k = index_[0].dim() == 3 ? index_[0].size(2) - read - write : 0;
    for (size_t i = 0; i < count; ++i) {
      const std::vector<Tensor> own(weights.begin() + 7 * i, weights.begin() + 7 * (i + 1));
      cells.emplace_back(own, batch, input, heads, read, write, top_k, softmax);
      const SlotMoeSizes& s = cells[i].sizes;
      const Tensor& like = cells[0].weights[0];
      if (s.slots != sizes().slots || s.size != sizes().size || s.experts != sizes().experts) {
        fail("weights", "be those of one cell", own[0]);
      }
      const ScalarType dtype = like.scalar_type();
      saved.push_back(checked("saved", saved_[i], like, dtype, {-1, batch, s.saved()}));
      const int64_t n = saved[i].size(0);
      inputs.push_back(checked("inputs", inputs_[i], like, dtype, {n, batch, input}));
      index.push_back(
          checked_indices("index", index_[i], like, {n, batch, s.indices()}, std::max(s.slots, s.experts)));
      for (int64_t k = 0; k < index[i].numel(); ++k) {
        const bool slot = k % s.indices() < s.support();
        check_number("index", indices(index[i])[k], 0, (slot ? s.slots : s.experts) - 1);
      }
      steps += n;
    }
    if (at.size() != 9) {
      throw std::invalid_argument("columns must be 9 numbers, got " + std::to_string(at.size()));
    }
    columns = {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8]};
  }

  const SlotMoeSizes& sizes() const { return cells[0].sizes; }
  const Tensor& like() const { return cells[0].weights[0]; }

  void check_columns(int64_t core, int64_t experts) const {
    const SlotMoeSizes& s = sizes();
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
};

// The same for the kernels; it points into the tensors.
template <typename T>
struct Window {
  std::vector<SlotMoeWeights<T>> weights;
  std::vector<SlotMoeStep<T>> step;
  SlotMoeSteps<T> steps;

  explicit Window(const WindowTensors& from) {
    const SlotMoeSizes& s = from.sizes();
    for (size_t i = 0; i < from.cells.size(); ++i) {
      const SlotMoeWeights<T> own = from.cells[i].of<T>();
      // Segments that were run with the same weights share them.
      if (weights.empty() || weights.back().key_value != own.key_value) weights.push_back(own);
      for (int64_t t = 0; t < from.saved[i].size(0); ++t) {
        step.push_back({numbers<T>(from.inputs[i]) + t * s.batch * s.input,
                        numbers<T>(from.saved[i]) + t * s.batch * s.saved(),
                        indices(from.index[i]) + t * s.batch * s.indices(), static_cast<int64_t>(weights.size()) - 1});
      }
    }
    steps = {s,
             from.columns,
             step.data(),
             static_cast<int64_t>(step.size()),
             weights.data(),
             static_cast<int64_t>(weights.size())};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> slot_moe_forward(Tensor state, Tensor query_token,
                                                            std::vector<Tensor> weights, int64_t heads, int64_t read,
                                                            int64_t write, int64_t top_k, bool least_used, bool softmax) {
  const CellTensors cell(weights, state.dim() == 3 ? state.size(0) : -1, 0, heads, read, write, top_k, softmax);
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
    kernels<T>().slot_moe_forward({s, cell.of<T>(), least_used, n, numbers<T>(query_token), writable<T>(new_state),
                                   writable<T>(slots), writable<T>(saved), writable<int64_t>(index)},
                                  kThreads);
  });
  return {new_state, slots, saved, index};
}

void slot_moe_pull_back_(Tensor v, Tensor core, Tensor experts, std::optional<Tensor> cotangent,
                         std::vector<Tensor> inputs, std::vector<Tensor> saved, std::vector<Tensor> index,
                         std::vector<Tensor> weights, std::vector<int64_t> columns, int64_t heads, int64_t read, int64_t write,
                         bool softmax) {
  const WindowTensors window(inputs, saved, index, weights, columns, heads, read, write, softmax);
  const SlotMoeSizes& s = window.sizes();
  const Tensor& like = window.like();
  const ScalarType dtype = like.scalar_type();
  v = checked_in_place("v", v, like, dtype, {s.batch, s.hidden()});
  core = checked_in_place("core", core, like, dtype, {-1});
  experts = checked_in_place("experts", experts, like, dtype, {s.experts, -1});
  window.check_columns(core.size(0), experts.size(1));
  if (cotangent.has_value()) {
    cotangent = checked("cotangent", *cotangent, like, dtype, {window.steps, s.batch, s.support(), s.size});
  }
  for_scalar_type("v", v, [&](auto scalar) {
    using T = decltype(scalar);
    const Window<T> of(window);
    kernels<T>().slot_moe_pull_back(
        {of.steps, writable<T>(v), cotangent.has_value() ? numbers<T>(*cotangent) : nullptr, writable<T>(core),
         writable<T>(experts), core.size(0), experts.size(1)},
        kThreads);
  });
}

void slot_moe_transfer_(Tensor phi, std::vector<Tensor> inputs, std::vector<Tensor> saved, std::vector<Tensor> index,
                         std::vector<Tensor> weights, std::vector<int64_t> columns, int64_t heads, int64_t read, int64_t write,
                         bool softmax) {
  const WindowTensors window(inputs, saved, index, weights, columns, heads, read, write, softmax);
  const SlotMoeSizes& s = window.sizes();
  phi = checked_in_place("phi", phi, window.like(), window.like().scalar_type(), {s.batch, -1, s.hidden()});
  if (phi.size(1) == 0) return;
  for_scalar_type("phi", phi, [&](auto scalar) {
    using T = decltype(scalar);
    const Window<T> of(window);
    kernels<T>().slot_moe_transfer({of.steps, writable<T>(phi), phi.size(1)}, kThreads);
  });
}

void slot_moe_commit_(Tensor core, Tensor experts, Tensor phi, Tensor rows, std::vector<Tensor> inputs, std::vector<Tensor> saved, std::vector<Tensor> index,
                         std::vector<Tensor> weights, std::vector<int64_t> columns, int64_t heads, int64_t read, int64_t write,
                         bool softmax) {
  const WindowTensors window(inputs, saved, index, weights, columns, heads, read, write, softmax);
  const SlotMoeSizes& s = window.sizes();
  const Tensor& like = window.like();
  const ScalarType dtype = like.scalar_type();
  core = checked_in_place("core", core, like, dtype, {s.batch, s.hidden() + 1, -1});
  experts = checked_in_place("experts", experts, like, dtype, {s.batch * s.experts, s.hidden() + 1, -1});
  phi = checked_in_place("phi", phi, like, dtype, {s.batch, -1, s.hidden()});
  rows = checked_indices("rows", rows, like, {s.batch, phi.size(1)}, s.hidden());
  window.check_columns(core.size(2), experts.size(2));
  if (phi.size(1) == 0) return;
  for_scalar_type("core", core, [&](auto scalar) {
    using T = decltype(scalar);
    const Window<T> of(window);
    kernels<T>().slot_moe_commit({{of.steps, writable<T>(phi), phi.size(1)},
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
