// The operations on rings of nodes for a device, through torch's stable ABI. `Device` runs the kernels: it has a
// function tree_append(arguments, tensor on the device), and so on, and says whether it reads the values of indices.
#ifndef SPARSE_RTRL_TREE_OPERATIONS_H_
#define SPARSE_RTRL_TREE_OPERATIONS_H_

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "rings.h"
#include "tensor_checks.h"

namespace sparse_rtrl {

// The four tensors of a ring, checked.
struct RingTensors {
  Tensor rows, cols, blocks, loss_rows;

  RingTensors(const Tensor& ring_rows, const Tensor& ring_cols, const Tensor& ring_blocks,
              const Tensor& ring_loss_rows, const Tensor& like, ScalarType dtype, int64_t slot_size)
      : rows(ring_rows), cols(ring_cols), blocks(ring_blocks), loss_rows(ring_loss_rows) {
    if (slot_size < 1) throw std::invalid_argument("slot_size must be at least 1, got " + std::to_string(slot_size));
    checked_in_place("rows", rows, like, ScalarType::Long, {-1, -1, -1});
    const int64_t length = rows.size(0), batch = rows.size(1);
    if (length < 1) fail("rows", "hold at least one place", rows);
    checked_in_place("cols", cols, like, ScalarType::Long, {length, batch, -1});
    const int64_t width = cols.size(2) * slot_size;
    checked_in_place("blocks", blocks, like, dtype, {length, batch, rows.size(2) * slot_size, width});
    checked_in_place("loss_rows", loss_rows, like, dtype, {length, batch, width});
  }

  template <typename T>
  Ring<T> ring() const {
    return {static_cast<int64_t*>(rows.mutable_data_ptr()),
            static_cast<int64_t*>(cols.mutable_data_ptr()),
            static_cast<T*>(blocks.mutable_data_ptr()),
            static_cast<T*>(loss_rows.mutable_data_ptr()),
            rows.size(0),
            rows.size(2),
            cols.size(2)};
  }
};

// Throws unless a slot set is sorted, distinct up to repetitions of its largest slot, and within 0 ... num_slots - 1.
inline void check_slots(const std::string& name, const int64_t* slots, int64_t size, int64_t num_slots) {
  for (int64_t i = 0; i < size; ++i) {
    if (slots[i] < 0 || slots[i] >= num_slots) {
      throw std::out_of_range(name + " must lie in 0 ... " + std::to_string(num_slots - 1) + ", got " +
                              std::to_string(slots[i]));
    }
    if (i > 0 && (slots[i] < slots[i - 1] || (slots[i] == slots[i - 1] && slots[i] != slots[size - 1]))) {
      throw std::invalid_argument(name + " must be sorted and repeat no slot but the largest");
    }
  }
}

// Checks one node of a ring.
inline void check_node(const RingTensors& ring, int64_t index, int64_t stream, int64_t num_slots) {
  const int64_t at = index % ring.rows.size(0) * ring.rows.size(1) + stream;
  const int64_t num_rows = ring.rows.size(2), num_cols = ring.cols.size(2);
  check_slots("rows", indices(ring.rows) + at * num_rows, num_rows, num_slots);
  check_slots("cols", indices(ring.cols) + at * num_cols, num_cols, num_slots);
}

// Throws unless segments from `start` on are in a window of `capacity` segments.
inline void check_start(int64_t start, int64_t count, int64_t capacity) {
  if (start < 0 || start < count - capacity) {
    throw std::out_of_range("starts must be at least count - L = " +
                            std::to_string(std::max<int64_t>(0, count - capacity)) + ", got " + std::to_string(start));
  }
}

inline void check_count(const Tensor& count, const Tensor& like) {
  checked_in_place("count", count, like, ScalarType::Long, {});
}

// The rings of all levels, checked.
class TreeTensors {
 public:
  TreeTensors(const std::vector<Tensor>& rows, const std::vector<Tensor>& cols, const std::vector<Tensor>& blocks,
              const std::vector<Tensor>& loss_rows, int64_t num_slots, int64_t slot_size)
      : num_slots_(num_slots), slot_size_(slot_size) {
    const size_t size = rows.size();
    if (cols.size() != size || blocks.size() != size || loss_rows.size() != size || size == 0 || size > kMaxLevels) {
      throw std::invalid_argument("rows, cols, blocks and loss_rows must have one entry per level, at most " +
                                  std::to_string(kMaxLevels) + ", got " + std::to_string(size) + ", " +
                                  std::to_string(cols.size()) + ", " + std::to_string(blocks.size()) + " and " +
                                  std::to_string(loss_rows.size()));
    }
    levels_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      levels_.emplace_back(rows[i], cols[i], blocks[i], loss_rows[i], blocks[0], blocks[0].scalar_type(), slot_size);
      if (i == 0) continue;
      const RingTensors &ring = levels_[i], &below = levels_[i - 1];
      if (ring.rows.size(0) != levels_[0].rows.size(0) >> i || ring.rows.size(1) != batch() ||
          ring.rows.size(2) != union_size(below.rows.size(2), below.rows.size(2), num_slots)) {
        fail("rows", "be (L >> level, B, min(S, 2^level R)) at level " + std::to_string(i), ring.rows);
      }
      if (ring.cols.size(2) != union_size(below.cols.size(2), below.cols.size(2), num_slots)) {
        fail("cols", "be (L >> level, B, min(S, 2^level C)) at level " + std::to_string(i), ring.cols);
      }
    }
  }

  const RingTensors& level(int64_t i) const { return levels_[i]; }
  const Tensor& like() const { return levels_[0].blocks; }
  int64_t batch() const { return levels_[0].rows.size(1); }
  int64_t capacity() const { return levels_[0].rows.size(0); }
  int highest() const { return static_cast<int>(levels_.size()) - 1; }

  template <typename T>
  Tree<T> tree() const {
    Tree<T> out;
    for (size_t i = 0; i < levels_.size(); ++i) out.levels[i] = levels_[i].template ring<T>();
    out.highest = highest();
    out.batch = batch();
    out.num_slots = num_slots_;
    out.slot_size = slot_size_;
    return out;
  }

 private:
  std::vector<RingTensors> levels_;
  int64_t num_slots_;
  int64_t slot_size_;
};

// See sparse_rtrl/ops/reference.py for what the operations do.
template <typename Device>
void tree_append_(std::vector<Tensor> rows, std::vector<Tensor> cols, std::vector<Tensor> blocks,
                  std::vector<Tensor> loss_rows, Tensor count, Tensor Jh, Tensor write, Tensor support,
                  std::optional<Tensor> loss_row, int64_t first, int64_t num_slots, int64_t slot_size) {
  const TreeTensors tensors(rows, cols, blocks, loss_rows, num_slots, slot_size);
  const Tensor& like = tensors.like();
  const int64_t batch = tensors.batch();
  check_count(count, like);
  write = checked_indices("write", write, like, {batch, -1}, num_slots);
  support = checked_indices("support", support, like, {batch, -1}, num_slots);
  const int64_t kw = write.size(1), ks = support.size(1);
  const RingTensors& leaves = tensors.level(0);
  if (std::max<int64_t>(1, std::min(kw, num_slots)) > leaves.rows.size(2) ||
      std::max<int64_t>(1, std::min(ks, num_slots)) > leaves.cols.size(2)) {
    throw std::invalid_argument("write and support must fit the rings, that is have at most " +
                                std::to_string(leaves.rows.size(2)) + " and " + std::to_string(leaves.cols.size(2)) +
                                " slots, got " + std::to_string(kw) + " and " + std::to_string(ks));
  }
  Jh = checked("Jh", Jh, like, like.scalar_type(), {batch, kw * slot_size, ks * slot_size});
  if (loss_row.has_value()) {
    loss_row = checked("loss_row", *loss_row, like, like.scalar_type(), {batch, num_slots * slot_size});
  }
  if (Device::kReadsValues) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t* s = indices(support) + b * ks;
      for (int64_t i = 0; i < kw; ++i) {
        if (std::find(s, s + ks, indices(write)[b * kw + i]) == s + ks) {
          throw std::invalid_argument("write must be contained in support, got slot " +
                                      std::to_string(indices(write)[b * kw + i]) + " in stream " + std::to_string(b));
        }
      }
    }
  }
  for_scalar_type("blocks", like, [&](auto scalar) {
    using T = decltype(scalar);
    Device::template tree_append<T>({tensors.tree<T>(), static_cast<int64_t*>(count.mutable_data_ptr()), first,
                                     numbers<T>(Jh), indices(write), indices(support),
                                     loss_row.has_value() ? numbers<T>(*loss_row) : nullptr, kw, ks},
                                    like);
  });
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> suffix_product(std::vector<Tensor> rows, std::vector<Tensor> cols,
                                                          std::vector<Tensor> blocks, std::vector<Tensor> loss_rows,
                                                          Tensor count, Tensor streams, Tensor starts,
                                                          int64_t num_rows, int64_t num_cols, int64_t num_slots,
                                                          int64_t slot_size) {
  const TreeTensors tensors(rows, cols, blocks, loss_rows, num_slots, slot_size);
  const Tensor& like = tensors.like();
  const int64_t products = streams.numel();
  check_count(count, like);
  streams = checked_indices("streams", streams, like, {products}, tensors.batch());
  starts = checked("starts", starts, like, ScalarType::Long, {products});
  if (num_rows < 0 || num_cols < num_rows) {
    throw std::invalid_argument("num_rows and num_cols must be at least 0, and num_cols at least num_rows, got " +
                                std::to_string(num_rows) + " and " + std::to_string(num_cols));
  }
  if (Device::kReadsValues) {
    const int64_t now = *indices(count);
    for (int64_t q = 0; q < products; ++q) {
      check_start(indices(starts)[q], now, tensors.capacity());
      for (int64_t position = indices(starts)[q]; position < now;) {
        const NodeId node = covering_node(position, now, tensors.highest());
        check_node(tensors.level(node.level), node.index, indices(streams)[q], num_slots);
        position += int64_t{1} << node.level;
      }
    }
  }
  Tensor out_rows = torch::stable::new_empty(streams, {products, num_rows});
  Tensor out_cols = torch::stable::new_empty(streams, {products, num_cols});
  Tensor out_blocks = torch::stable::new_empty(like, {products, num_rows * slot_size, num_cols * slot_size});
  Tensor out_loss_rows = torch::stable::new_empty(like, {products, num_cols * slot_size});
  for_scalar_type("blocks", like, [&](auto scalar) {
    using T = decltype(scalar);
    Device::template suffix_product<T>(
        {tensors.tree<T>(), indices(count), indices(streams), indices(starts), products,
         static_cast<int64_t*>(out_rows.mutable_data_ptr()), static_cast<int64_t*>(out_cols.mutable_data_ptr()),
         static_cast<T*>(out_blocks.mutable_data_ptr()), static_cast<T*>(out_loss_rows.mutable_data_ptr()), num_rows,
         num_cols},
        like);
  });
  return {out_rows, out_cols, out_blocks, out_loss_rows};
}

template <typename Device>
void catch_up_(Tensor P, Tensor rows, Tensor cols, Tensor blocks, Tensor loss_rows, Tensor count, Tensor streams,
               Tensor groups, Tensor starts, int64_t slot_size) {
  check_influence(P);
  const int64_t matrices = groups.numel(), hidden = P.size(1) - 1;
  if (matrices == 0) return;
  if (slot_size < 1 || hidden % slot_size != 0) {
    throw std::invalid_argument("slot_size must divide H = " + std::to_string(hidden) + ", got " +
                                std::to_string(slot_size));
  }
  const RingTensors ring(rows, cols, blocks, loss_rows, P, P.scalar_type(), slot_size);
  check_count(count, P);
  streams = checked_indices("streams", streams, P, {matrices}, rows.size(1));
  groups = checked_indices("groups", groups, P, {matrices}, P.size(0));
  starts = checked("starts", starts, P, ScalarType::Long, {matrices});
  if (Device::kReadsValues) {
    const int64_t now = *indices(count);
    std::vector<int64_t> oldest(rows.size(1), now);
    for (int64_t i = 0; i < matrices; ++i) {
      check_start(indices(starts)[i], now, rows.size(0));
      int64_t& of_stream = oldest[indices(streams)[i]];
      of_stream = std::min(of_stream, indices(starts)[i]);
    }
    for (int64_t b = 0; b < rows.size(1); ++b) {
      for (int64_t t = oldest[b]; t < now; ++t) check_node(ring, t, b, hidden / slot_size);
    }
  }
  for_scalar_type("P", P, [&](auto scalar) {
    using T = decltype(scalar);
    Device::template catch_up<T>({static_cast<T*>(P.mutable_data_ptr()), hidden + 1, P.size(2), ring.ring<T>(),
                                  rows.size(1), slot_size, indices(count), indices(streams), indices(groups),
                                  indices(starts), matrices},
                                 P);
  });
}

template <typename Device>
Tensor suffix_loss_rows(Tensor rows, Tensor cols, Tensor blocks, Tensor loss_rows, Tensor count, Tensor starts,
                        Tensor newest, int64_t slot_size) {
  if (newest.dim() != 2 || slot_size < 1 || newest.size(1) % slot_size != 0) {
    fail("newest", "be (B, H) with slot_size = " + std::to_string(slot_size) + " a divisor of H", newest);
  }
  const int64_t batch = newest.size(0), hidden = newest.size(1);
  newest = as_contiguous(newest);
  const RingTensors ring(rows, cols, blocks, loss_rows, newest, newest.scalar_type(), slot_size);
  if (rows.size(1) != batch) fail("newest", "have B = " + std::to_string(rows.size(1)) + " rows", newest);
  check_count(count, newest);
  starts = checked("starts", starts, newest, ScalarType::Long, {batch, -1});
  const int64_t experts = starts.size(1);
  if (Device::kReadsValues) {
    const int64_t now = *indices(count);
    for (int64_t b = 0; b < batch; ++b) {
      int64_t oldest = now;
      for (int64_t e = 0; e < experts; ++e) {
        check_start(indices(starts)[b * experts + e], now, rows.size(0));
        oldest = std::min(oldest, indices(starts)[b * experts + e]);
      }
      for (int64_t t = oldest; t < now; ++t) check_node(ring, t, b, hidden / slot_size);
    }
  }
  Tensor out = torch::stable::new_empty(newest, {batch, experts, hidden});
  for_scalar_type("newest", newest, [&](auto scalar) {
    using T = decltype(scalar);
    Device::template suffix_loss_rows<T>({ring.ring<T>(), batch, slot_size, hidden, indices(count), indices(starts),
                                          numbers<T>(newest), static_cast<T*>(out.mutable_data_ptr()), experts},
                                         newest);
  });
  return out;
}

}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_TREE_OPERATIONS_H_
