// The CPU kernels behind the operations of sparse_rtrl/ops/dispatch.py, through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "threads.h"
#include "tree_operations.h"

namespace sparse_rtrl {
namespace {

void influence_update_(Tensor P, Tensor Jh, Tensor write, Tensor support, std::optional<Tensor> loss_row,
                       Tensor streams, Tensor groups, std::vector<Tensor> deltas, std::vector<Tensor> zs,
                       std::vector<int64_t> offsets) {
  check_influence(P);
  const ScalarType dtype = P.scalar_type();
  const int64_t count = groups.numel(), batch = Jh.dim() == 3 ? Jh.size(0) : -1;
  const int64_t hidden = P.size(1) - 1, columns = P.size(2);
  if (count == 0 || support.numel() == 0) return;
  Jh = checked("Jh", Jh, P, dtype, {batch, -1, -1});
  write = checked_indices("write", write, P, {batch, -1}, hidden);
  const int64_t num_support = support.dim() == 2 ? support.size(1) : 0;
  support = checked("support", support, P, ScalarType::Long, {batch, num_support});
  const int64_t slot_size = Jh.size(2) / num_support, w = Jh.size(1), r = Jh.size(2);
  if (slot_size == 0 || hidden % slot_size != 0 || r != num_support * slot_size || w != write.size(1) * slot_size) {
    fail("Jh", "be (B, kw * D, ks * D) with D a divisor of H = " + std::to_string(hidden), Jh);
  }
  write = checked_indices("write", write, P, {batch, -1}, hidden / slot_size);
  support = checked_indices("support", support, P, {batch, -1}, hidden / slot_size);
  streams = checked_indices("streams", streams, P, {count}, batch);
  groups = checked_indices("groups", groups, P, {count}, P.size(0));
  if (loss_row.has_value()) loss_row = checked("loss_row", *loss_row, P, dtype, {batch, r});
  if (deltas.size() != zs.size() || deltas.size() != offsets.size()) {
    throw std::invalid_argument("deltas, zs and offsets must have one entry per parameter, got " +
                                std::to_string(deltas.size()) + ", " + std::to_string(zs.size()) + " and " +
                                std::to_string(offsets.size()));
  }
  for (size_t i = 0; i < deltas.size(); ++i) {
    deltas[i] = checked("deltas", deltas[i], P, dtype, {count, w, -1, -1});
    zs[i] = checked("zs", zs[i], P, dtype, {count, deltas[i].size(2), -1});
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
  check_influence(P);
  const int64_t count = groups.numel();
  if (count == 0) return;
  u = checked("u", u, P, P.scalar_type(), {count, P.size(1) - 1});
  groups = checked_indices("groups", groups, P, {count}, P.size(0));
  for_scalar_type("P", P, [&](auto scalar) {
    using T = decltype(scalar);
    kernels<T>().loss_row(
        {static_cast<T*>(P.mutable_data_ptr()), P.size(1), P.size(2), numbers<T>(u), indices(groups), count}, kThreads);
  });
}

bool is_complex(ScalarType dtype) {
  return dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble;
}

ScalarType real_dtype(ScalarType dtype) {
  if (dtype == ScalarType::ComplexFloat) return ScalarType::Float;
  return dtype == ScalarType::ComplexDouble ? ScalarType::Double : dtype;
}

void check_diagonal(const Tensor& P) {
  const ScalarType real = real_dtype(P.scalar_type());
  if ((real != ScalarType::Float && real != ScalarType::Double) || P.dim() != 3 || !P.is_contiguous()) {
    fail("P", "be contiguous float32, float64, complex64 or complex128 of shape (B, R, J)", P);
  }
}

template <typename Body>
void for_real_type(const Tensor& P, Body&& body) {
  if (real_dtype(P.scalar_type()) == ScalarType::Float) {
    body(float{});
  } else {
    body(double{});
  }
}

void diagonal_update_(Tensor P, Tensor decay, Tensor delta, Tensor z, std::optional<Tensor> g,
                      std::optional<Tensor> u) {
  check_diagonal(P);
  const ScalarType dtype = P.scalar_type();
  const int64_t batch = P.size(0), rows = P.size(1), columns = P.size(2);
  decay = checked("decay", decay, P, dtype, {batch, rows});
  delta = checked("delta", delta, P, dtype, {batch, rows, -1});
  z = checked("z", z, P, real_dtype(dtype), {batch, delta.size(2), columns});
  if (g.has_value() != u.has_value()) {
    throw std::invalid_argument(std::string("g and u must be given together or not at all, got ") +
                                (g.has_value() ? "g without u" : "u without g"));
  }
  if (g.has_value()) {
    checked_in_place("g", *g, P, dtype, {rows, columns});
    u = checked("u", *u, P, dtype, {batch, rows});
  }
  for_real_type(P, [&](auto scalar) {
    using T = decltype(scalar);
    kernels<T>().diagonal_update({static_cast<T*>(P.mutable_data_ptr()), numbers<T>(decay), numbers<T>(delta),
                                  numbers<T>(z), g.has_value() ? static_cast<T*>(g->mutable_data_ptr()) : nullptr,
                                  u.has_value() ? numbers<T>(*u) : nullptr, batch, rows, columns, delta.size(2),
                                  is_complex(dtype)},
                                 kThreads);
  });
}

void diagonal_loss_(Tensor g, Tensor P, Tensor u) {
  check_diagonal(P);
  const int64_t batch = P.size(0), rows = P.size(1), columns = P.size(2);
  checked_in_place("g", g, P, P.scalar_type(), {rows, columns});
  u = checked("u", u, P, P.scalar_type(), {batch, rows});
  for_real_type(P, [&](auto scalar) {
    using T = decltype(scalar);
    // The kernel reads P alone; its arguments are those of the update.
    kernels<T>().diagonal_loss({const_cast<T*>(numbers<T>(P)), nullptr, nullptr, nullptr,
                                static_cast<T*>(g.mutable_data_ptr()), numbers<T>(u), batch, rows, columns, 0,
                                is_complex(P.scalar_type())},
                               kThreads);
  });
}

// The kernels of the tree on the CPU.
struct Cpu {
  static constexpr bool kReadsValues = true;

  template <typename T>
  static void tree_append(const TreeAppend<T>& arguments, const Tensor&) {
    kernels<T>().tree_append(arguments, kThreads);
  }
  template <typename T>
  static void suffix_product(const SuffixProduct<T>& arguments, const Tensor&) {
    kernels<T>().suffix_product(arguments, kThreads);
  }
  template <typename T>
  static void catch_up(const CatchUp<T>& arguments, const Tensor&) {
    kernels<T>().catch_up(arguments, kThreads);
  }
  template <typename T>
  static void suffix_loss_rows(const SuffixLossRows<T>& arguments, const Tensor&) {
    kernels<T>().suffix_loss_rows(arguments, kThreads);
  }
};

}  // namespace
}  // namespace sparse_rtrl

STABLE_TORCH_LIBRARY_IMPL(sparse_rtrl, CPU, m) {
  m.impl("influence_update_", TORCH_BOX(&sparse_rtrl::influence_update_));
  m.impl("loss_row_", TORCH_BOX(&sparse_rtrl::loss_row_));
  m.impl("tree_append_", TORCH_BOX(&sparse_rtrl::tree_append_<sparse_rtrl::Cpu>));
  m.impl("suffix_product", TORCH_BOX(&sparse_rtrl::suffix_product<sparse_rtrl::Cpu>));
  m.impl("catch_up_", TORCH_BOX(&sparse_rtrl::catch_up_<sparse_rtrl::Cpu>));
  m.impl("suffix_loss_rows", TORCH_BOX(&sparse_rtrl::suffix_loss_rows<sparse_rtrl::Cpu>));
  m.impl("diagonal_update_", TORCH_BOX(&sparse_rtrl::diagonal_update_));
  m.impl("diagonal_loss_", TORCH_BOX(&sparse_rtrl::diagonal_loss_));
}
