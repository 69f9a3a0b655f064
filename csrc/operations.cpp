// The CPU kernels behind the operations of sparse_rtrl/ops.py, through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace sparse_rtrl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Parallel kThreads{[](int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= grain) {
    body(context, 0, count);
  } else {
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }
}};

std::string shape_of(const Tensor& tensor) {
  std::string out = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) out += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return out + ")";
}

[[noreturn]] void fail(const std::string& name, const std::string& expected, const Tensor& got) {
  throw std::invalid_argument(name + " must " + expected + ", got " + torch::headeronly::toString(got.scalar_type()) +
                              " " + shape_of(got));
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A contiguous tensor of the given dtype and shape (-1: any size).
Tensor checked(const std::string& name, const Tensor& tensor, ScalarType dtype, const std::vector<int64_t>& shape) {
  bool fits = tensor.scalar_type() == dtype && tensor.is_cpu() && tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = shape[i] < 0 || tensor.size(static_cast<int64_t>(i)) == shape[i];
  }
  if (!fits) {
    std::string wanted;
    for (const int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
    fail(name, std::string("be ") + torch::headeronly::toString(dtype) + " of shape (" + wanted + ") on the CPU",
         tensor);
  }
  return as_contiguous(tensor);
}

// As `checked`, for indices from 0 to limit - 1.
Tensor checked_indices(const std::string& name, const Tensor& tensor, const std::vector<int64_t>& shape,
                       int64_t limit) {
  Tensor out = checked(name, tensor, ScalarType::Long, shape);
  const int64_t* values = static_cast<const int64_t*>(out.const_data_ptr());
  for (int64_t i = 0; i < out.numel(); ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      throw std::out_of_range(name + " must lie in 0 ... " + std::to_string(limit - 1) + ", got " +
                              std::to_string(values[i]));
    }
  }
  return out;
}

const int64_t* indices(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

template <typename T>
const T* numbers(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

Tensor checked_influence(const Tensor& P) {
  const bool known = P.scalar_type() == ScalarType::Float || P.scalar_type() == ScalarType::Double;
  if (!known || P.dim() != 3 || P.size(1) < 1 || !P.is_contiguous()) {
    fail("P", "be contiguous float32 or float64 of shape (G, H + 1, N)", P);
  }
  return P;
}

// Calls `body` with a zero of the scalar type of a tensor.
template <typename Body>
void for_scalar_type(const std::string& name, const Tensor& tensor, Body&& body) {
  if (tensor.scalar_type() == ScalarType::Float) {
    body(float{});
  } else if (tensor.scalar_type() == ScalarType::Double) {
    body(double{});
  } else {
    fail(name, "be float32 or float64", tensor);
  }
}

void influence_update_(Tensor P, Tensor Jh, Tensor write, Tensor support, std::optional<Tensor> loss_row,
                       Tensor streams, Tensor groups, std::vector<Tensor> deltas, std::vector<Tensor> zs,
                       std::vector<int64_t> offsets) {
  checked_influence(P);
  const ScalarType dtype = P.scalar_type();
  const int64_t count = groups.numel(), batch = Jh.dim() == 3 ? Jh.size(0) : -1;
  const int64_t hidden = P.size(1) - 1, columns = P.size(2);
  if (count == 0 || support.numel() == 0) return;
  Jh = checked("Jh", Jh, dtype, {batch, -1, -1});
  write = checked_indices("write", write, {batch, -1}, hidden);
  const int64_t num_support = support.dim() == 2 ? support.size(1) : 0;
  support = checked("support", support, ScalarType::Long, {batch, num_support});
  const int64_t slot_size = Jh.size(2) / num_support, w = Jh.size(1), r = Jh.size(2);
  if (slot_size == 0 || hidden % slot_size != 0 || r != num_support * slot_size || w != write.size(1) * slot_size) {
    fail("Jh", "be (B, kw * D, ks * D) with D a divisor of H = " + std::to_string(hidden), Jh);
  }
  write = checked_indices("write", write, {batch, -1}, hidden / slot_size);
  support = checked_indices("support", support, {batch, -1}, hidden / slot_size);
  streams = checked_indices("streams", streams, {count}, batch);
  groups = checked_indices("groups", groups, {count}, P.size(0));
  if (loss_row.has_value()) loss_row = checked("loss_row", *loss_row, dtype, {batch, r});
  if (deltas.size() != zs.size() || deltas.size() != offsets.size()) {
    throw std::invalid_argument("deltas, zs and offsets must have one entry per parameter, got " +
                                std::to_string(deltas.size()) + ", " + std::to_string(zs.size()) + " and " +
                                std::to_string(offsets.size()));
  }
  for (size_t i = 0; i < deltas.size(); ++i) {
    deltas[i] = checked("deltas", deltas[i], dtype, {count, w, -1, -1});
    zs[i] = checked("zs", zs[i], dtype, {count, deltas[i].size(2), -1});
    if (offsets[i] < 0 || offsets[i] + deltas[i].size(3) * zs[i].size(2) > columns) {
      throw std::out_of_range("offsets must leave room for every parameter in N = " + std::to_string(columns) +
                              " columns, got " + std::to_string(offsets[i]));
    }
  }
  for_scalar_type("P", P, [&](auto scalar) {
    using T = decltype(scalar);
    std::vector<ImmediateTerm<T>> terms;
    for (size_t i = 0; i < deltas.size(); ++i) {
      terms.push_back(
          {numbers<T>(deltas[i]), numbers<T>(zs[i]), deltas[i].size(2), deltas[i].size(3), zs[i].size(2), offsets[i]});
    }
    kernels<T>().influence_update(
        {static_cast<T*>(P.mutable_data_ptr()), hidden + 1, columns, numbers<T>(Jh), indices(write), indices(support),
         loss_row.has_value() ? numbers<T>(*loss_row) : nullptr, batch, write.size(1), num_support, slot_size,
         indices(streams), indices(groups), count, terms.data(), static_cast<int64_t>(terms.size())},
        kThreads);
  });
}

void loss_row_(Tensor P, Tensor u, Tensor groups) {
  checked_influence(P);
  const int64_t count = groups.numel();
  if (count == 0) return;
  u = checked("u", u, P.scalar_type(), {count, P.size(1) - 1});
  groups = checked_indices("groups", groups, {count}, P.size(0));
  for_scalar_type("P", P, [&](auto scalar) {
    using T = decltype(scalar);
    kernels<T>().loss_row(
        {static_cast<T*>(P.mutable_data_ptr()), P.size(1), P.size(2), numbers<T>(u), indices(groups), count}, kThreads);
  });
}

// Nodes given as four lists of tensors, checked and kept alive.
class Nodes {
 public:
  Nodes(const std::vector<Tensor>& rows, const std::vector<Tensor>& cols, const std::vector<Tensor>& blocks,
        const std::vector<Tensor>& loss_rows, ScalarType dtype, int64_t num_slots, int64_t slot_size)
      : slot_size_(slot_size) {
    const size_t size = rows.size();
    if (cols.size() != size || blocks.size() != size || loss_rows.size() != size || size == 0) {
      throw std::invalid_argument("rows, cols, blocks and loss_rows must have one entry per node, got " +
                                  std::to_string(size) + ", " + std::to_string(cols.size()) + ", " +
                                  std::to_string(blocks.size()) + " and " + std::to_string(loss_rows.size()));
    }
    if (slot_size < 1) throw std::invalid_argument("slot_size must be at least 1, got " + std::to_string(slot_size));
    batch_ = rows[0].dim() == 2 ? rows[0].size(0) : -1;
    parts_.reserve(4 * size);
    for (size_t i = 0; i < size; ++i) {
      add_slots("rows", rows[i], num_slots);
      add_slots("cols", cols[i], num_slots);
      const int64_t w = rows[i].size(1) * slot_size, r = cols[i].size(1) * slot_size;
      parts_.push_back(checked("blocks", blocks[i], dtype, {batch_, w, r}));
      parts_.push_back(checked("loss_rows", loss_rows[i], dtype, {batch_, r}));
    }
  }

  int64_t size() const { return static_cast<int64_t>(parts_.size() / 4); }
  int64_t batch() const { return batch_; }

  template <typename T>
  std::vector<NodeBatch<T>> views() const {
    std::vector<NodeBatch<T>> out;
    out.reserve(parts_.size() / 4);
    for (size_t i = 0; i < parts_.size(); i += 4) {
      out.push_back({indices(parts_[i]), indices(parts_[i + 1]), numbers<T>(parts_[i + 2]), numbers<T>(parts_[i + 3]),
                     parts_[i].size(1), parts_[i + 1].size(1), slot_size_});
    }
    return out;
  }

 private:
  void add_slots(const std::string& name, const Tensor& slots, int64_t num_slots) {
    parts_.push_back(checked_indices(name, slots, {batch_, -1}, num_slots));
    const int64_t* values = indices(parts_.back());
    const int64_t k = slots.size(1);
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t i = 1; i < k; ++i) {
        if (values[b * k + i] < values[b * k + i - 1]) throw std::invalid_argument(name + " must be sorted");
      }
    }
  }

  std::vector<Tensor> parts_;
  int64_t batch_ = 0;
  int64_t slot_size_;
};

typedef std::tuple<Tensor, Tensor, Tensor, Tensor> NodeTensors;

NodeTensors product(const Nodes& nodes, const Tensor& like_slots, const Tensor& like, const int64_t* streams,
                    const int64_t* paths, int64_t count, int64_t depth, int64_t num_rows, int64_t num_cols,
                    int64_t num_slots, int64_t slot_size) {
  Tensor rows = torch::stable::new_empty(like_slots, {count, num_rows});
  Tensor cols = torch::stable::new_empty(like_slots, {count, num_cols});
  Tensor blocks = torch::stable::new_empty(like, {count, num_rows * slot_size, num_cols * slot_size});
  Tensor loss_row = torch::stable::new_empty(like, {count, num_cols * slot_size});
  for_scalar_type("blocks", like, [&](auto scalar) {
    using T = decltype(scalar);
    const std::vector<NodeBatch<T>> views = nodes.views<T>();
    kernels<T>().suffix_product(
        {views.data(), streams, paths, count, depth, num_slots, slot_size,
         NodeOutput<T>{static_cast<int64_t*>(rows.mutable_data_ptr()), static_cast<int64_t*>(cols.mutable_data_ptr()),
                       static_cast<T*>(blocks.mutable_data_ptr()), static_cast<T*>(loss_row.mutable_data_ptr()),
                       num_rows, num_cols}},
        kThreads);
  });
  return {rows, cols, blocks, loss_row};
}

NodeTensors tree_merge(Tensor newer_rows, Tensor newer_cols, Tensor newer_blocks, Tensor newer_loss_row,
                       Tensor older_rows, Tensor older_cols, Tensor older_blocks, Tensor older_loss_row,
                       int64_t num_slots, int64_t slot_size) {
  const Nodes nodes({newer_rows, older_rows}, {newer_cols, older_cols}, {newer_blocks, older_blocks},
                    {newer_loss_row, older_loss_row}, newer_blocks.scalar_type(), num_slots, slot_size);
  std::vector<int64_t> streams, paths;
  for (int64_t b = 0; b < nodes.batch(); ++b) {
    streams.push_back(b);
    paths.insert(paths.end(), {1, 0});
  }
  return product(nodes, newer_rows, newer_blocks, streams.data(), paths.data(), nodes.batch(), 2,
                 union_size(newer_rows.size(1), older_rows.size(1), num_slots),
                 union_size(newer_cols.size(1), older_cols.size(1), num_slots), num_slots, slot_size);
}

NodeTensors suffix_product(std::vector<Tensor> rows, std::vector<Tensor> cols, std::vector<Tensor> blocks,
                           std::vector<Tensor> loss_rows, Tensor streams, Tensor paths, int64_t num_rows,
                           int64_t num_cols, int64_t num_slots, int64_t slot_size) {
  if (blocks.empty()) throw std::invalid_argument("blocks must hold at least one node, got none");
  const Nodes nodes(rows, cols, blocks, loss_rows, blocks[0].scalar_type(), num_slots, slot_size);
  const int64_t count = streams.numel();
  streams = checked_indices("streams", streams, {count}, nodes.batch());
  paths = checked("paths", paths, ScalarType::Long, {count, -1});
  const int64_t depth = paths.size(1);
  if (num_rows < 0 || num_cols < 0 || (num_rows > 0 && num_cols == 0)) {
    throw std::invalid_argument("num_cols must be at least 1 where num_rows is, got " + std::to_string(num_rows) +
                                " rows and " + std::to_string(num_cols) + " columns");
  }
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t i = 0; i < depth; ++i) {
      const int64_t node = indices(paths)[q * depth + i];
      if (node >= nodes.size() || node < (i == 0 ? 0 : -1)) {
        throw std::out_of_range("paths must hold numbers of nodes, at least one a row, or -1 behind them, got " +
                                std::to_string(node));
      }
    }
  }
  return product(nodes, rows[0], blocks[0], indices(streams), indices(paths), count, depth, num_rows, num_cols,
                 num_slots, slot_size);
}

void catch_up_(Tensor P, std::vector<Tensor> rows, std::vector<Tensor> cols, std::vector<Tensor> blocks,
               std::vector<Tensor> loss_rows, Tensor streams, Tensor groups, Tensor first, int64_t slot_size) {
  checked_influence(P);
  const int64_t count = groups.numel(), hidden = P.size(1) - 1;
  if (count == 0 || rows.empty()) return;
  if (slot_size < 1 || hidden % slot_size != 0) {
    throw std::invalid_argument("slot_size must divide H = " + std::to_string(hidden) + ", got " +
                                std::to_string(slot_size));
  }
  const Nodes nodes(rows, cols, blocks, loss_rows, P.scalar_type(), hidden / slot_size, slot_size);
  streams = checked_indices("streams", streams, {count}, nodes.batch());
  groups = checked_indices("groups", groups, {count}, P.size(0));
  first = checked_indices("first", first, {count}, nodes.size() + 1);
  for_scalar_type("P", P, [&](auto scalar) {
    using T = decltype(scalar);
    const std::vector<NodeBatch<T>> views = nodes.views<T>();
    kernels<T>().catch_up({static_cast<T*>(P.mutable_data_ptr()), hidden + 1, P.size(2), views.data(), nodes.size(),
                           nodes.batch(), indices(streams), indices(groups), indices(first), count, slot_size},
                          kThreads);
  });
}

Tensor suffix_loss_rows(std::vector<Tensor> rows, std::vector<Tensor> cols, std::vector<Tensor> blocks,
                        std::vector<Tensor> loss_rows, Tensor starts, Tensor newest, int64_t slot_size) {
  const int64_t batch = newest.dim() == 2 ? newest.size(0) : -1, hidden = newest.dim() == 2 ? newest.size(1) : -1;
  if (slot_size < 1 || hidden < 0 || hidden % slot_size != 0) {
    fail("newest", "be (B, H) with slot_size = " + std::to_string(slot_size) + " a divisor of H", newest);
  }
  newest = checked("newest", newest, newest.scalar_type(), {batch, hidden});
  std::optional<Nodes> nodes;
  if (!rows.empty()) {
    nodes.emplace(rows, cols, blocks, loss_rows, newest.scalar_type(), hidden / slot_size, slot_size);
    if (nodes->batch() != batch) fail("newest", "have B = " + std::to_string(nodes->batch()) + " rows", newest);
  }
  starts = checked_indices("starts", starts, {batch, -1}, static_cast<int64_t>(rows.size()) + 1);
  Tensor out = torch::stable::new_empty(newest, {batch, starts.size(1), hidden});
  for_scalar_type("newest", newest, [&](auto scalar) {
    using T = decltype(scalar);
    const std::vector<NodeBatch<T>> views = nodes.has_value() ? nodes->views<T>() : std::vector<NodeBatch<T>>{};
    kernels<T>().suffix_loss_rows(
        {views.data(), static_cast<int64_t>(views.size()), indices(starts), numbers<T>(newest),
         static_cast<T*>(out.mutable_data_ptr()), batch, starts.size(1), hidden},
        kThreads);
  });
  return out;
}

}  // namespace
}  // namespace sparse_rtrl

STABLE_TORCH_LIBRARY_IMPL(sparse_rtrl, CPU, m) {
  m.impl("influence_update_", TORCH_BOX(&sparse_rtrl::influence_update_));
  m.impl("loss_row_", TORCH_BOX(&sparse_rtrl::loss_row_));
  m.impl("tree_merge", TORCH_BOX(&sparse_rtrl::tree_merge));
  m.impl("suffix_product", TORCH_BOX(&sparse_rtrl::suffix_product));
  m.impl("catch_up_", TORCH_BOX(&sparse_rtrl::catch_up_));
  m.impl("suffix_loss_rows", TORCH_BOX(&sparse_rtrl::suffix_loss_rows));
}
