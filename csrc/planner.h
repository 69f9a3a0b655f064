// Decides how the influence of sleeping experts is kept: moved at every segment (eager), or caught up later by replay
// or by merged products, and then how many segments and how deep a tree to keep. Free of torch and of Python.
//
// All costs are seconds per stream and segment, of the work on experts that a segment does not use; what is done for
// the active experts is the same either way and left out. The model is deterministic: rates are arguments, nothing is
// timed.
#ifndef SPARSE_RTRL_PLANNER_H_
#define SPARSE_RTRL_PLANNER_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "dyadic.h"

namespace sparse_rtrl {

struct MachineRates {
  double flops = 80e9;          // floating-point operations per second of the kernels
  double bytes = 8e9;           // bytes per second of reading or writing memory
  double lazy_seconds = 4e-4;   // bookkeeping per segment that eager updating does without, for all streams together
  double query_seconds = 3e-5;  // bookkeeping per wake-up
  double margin = 0.8;          // lazy must cost less than this part of eager
};

struct PlannerInput {
  int64_t num_slots = 1;       // S
  int64_t slot_size = 1;       // D
  int64_t read_slots = 1;      // kr
  int64_t write_slots = 1;     // kw
  int64_t num_experts = 0;     // E
  int64_t top_k = 1;           // k
  int64_t expert_columns = 1;  // N, parameters of one expert
  int64_t batch_size = 1;      // B
  int64_t commit_every = 1;    // steps of a segment
  double flush_every = 1.0;    // steps between two flushes
  int64_t buffer = 0;          // segments kept; 0 to choose
  int64_t itemsize = 4;
  MachineRates rates;
};

// One row of the cost table.
struct Option {
  std::string path;  // "eager", "replay", "product" (every wake-up), or "auto" (the cheaper at each gap)
  int64_t buffer = 0;
  int levels = 0;           // highest level of the tree
  double wake = 0.0;        // catching up, expiries included
  double append = 0.0;      // leaves and merges
  double flush = 0.0;       // loss rows of sleepers
  double overhead = 0.0;    // bookkeeping
  double tree_bytes = 0.0;  // of one stream
  double total() const { return wake + append + flush + overhead; }
};

struct Plan {
  bool eager = true;
  int64_t buffer = 1;
  int levels = 0;
  int64_t product_from = 0;   // smallest gap in segments that a product bridges cheaper than replay; 0 for none
  std::vector<Option> table;  // eager first, then the best of each path
};

class Planner {
 public:
  explicit Planner(const PlannerInput& input) : in_(input) {
    check("num_slots", in_.num_slots, 1);
    check("slot_size", in_.slot_size, 1);
    check("read_slots", in_.read_slots, 0);
    check("write_slots", in_.write_slots, 0);
    check("num_experts", in_.num_experts, 0);
    check("top_k", in_.top_k, 0);
    check("expert_columns", in_.expert_columns, 0);
    check("batch_size", in_.batch_size, 1);
    check("commit_every", in_.commit_every, 1);
    check("buffer", in_.buffer, 0);
    check("itemsize", in_.itemsize, 1);
    const double n = static_cast<double>(in_.commit_every), E = static_cast<double>(in_.num_experts);
    // Slots of a segment, and the chance that it uses a given expert.
    rows_ = std::min<double>(in_.num_slots, n * in_.write_slots);
    cols_ = std::min<double>(in_.num_slots, n * (in_.read_slots + in_.write_slots));
    use_ = in_.num_experts == 0 ? 1.0 : 1.0 - std::pow(1.0 - std::min(1.0, in_.top_k / E), n);
    const double scale = in_.itemsize > 4 ? 0.5 : 1.0;
    flops_ = in_.rates.flops * scale;
  }

  // One pass of an expert's influence through a map of so many rows and columns, in slots.
  double apply_seconds(double rows, double cols) const {
    const double D = static_cast<double>(in_.slot_size), N = static_cast<double>(in_.expert_columns);
    return std::max(2.0 * (rows * D + 1.0) * cols * D * N / flops_,
                    in_.itemsize * (rows + cols) * D * N / in_.rates.bytes);
  }

  double replay_seconds(double gap) const {
    const double bytes = 2.0 * in_.itemsize * hidden() * in_.expert_columns;
    return std::max(gap * apply_flops(), bytes / in_.rates.bytes);
  }

  // `levels` bounds the nodes that the product is merged from.
  double product_seconds(double gap, int levels) const {
    double nodes = gap;
    for (int level = 0; level < levels && nodes > 2.0; ++level) nodes = nodes / 2.0 + 0.5;
    nodes = std::max(nodes, std::min(gap, 1.0 + 0.75 * std::log2(std::max(gap, 1.0))));
    return (nodes - 1.0) * merge_seconds(gap) + apply_seconds(filled(gap * rows_), filled(gap * cols_));
  }

  // Merge of two nodes whose product covers so many segments.
  double merge_seconds(double segments) const {
    const double D = static_cast<double>(in_.slot_size);
    const double rows = filled(segments * rows_ / 2.0), cols = filled(segments * cols_ / 2.0);
    return 2.0 * (rows * D + 1.0) * rows * D * cols * D / (0.6 * flops_) +
           2.0 * in_.itemsize * filled(segments * rows_) * filled(segments * cols_) * D * D / in_.rates.bytes + 2e-6;
  }

  double tree_bytes(int64_t buffer, int levels) const {
    double total = 0.0;
    for (int level = 0; level <= levels; ++level) {
      const double width = static_cast<double>(int64_t{1} << level);
      total += static_cast<double>(buffer >> level) * filled(width * rows_) * filled(width * cols_);
    }
    return total * in_.itemsize * in_.slot_size * in_.slot_size;
  }

  Option eager() const {
    Option out;
    out.path = "eager";
    out.wake = in_.num_experts * (1.0 - use_) * apply_seconds(rows_, cols_);
    return out;
  }

  Option lazy(const std::string& path, int64_t buffer, int levels) const {
    Option out;
    out.path = path;
    out.buffer = buffer;
    out.levels = levels;
    out.tree_bytes = tree_bytes(buffer, levels);
    const double E = static_cast<double>(in_.num_experts), n = static_cast<double>(in_.commit_every);
    // Sleeps start E use (1 - use) times a segment; their length is geometric. One longer than the buffer is cut.
    const double sleeps = E * use_ * (1.0 - use_);
    double stay = 1.0, wakes = 0.0;
    for (int64_t gap = 1; gap < buffer && stay > 1e-9; ++gap) {
      out.wake += sleeps * stay * use_ * cheapest(path, static_cast<double>(gap), levels);
      wakes += sleeps * stay * use_;
      stay *= 1.0 - use_;
    }
    const double cut = 1.0 - std::pow(1.0 - use_, static_cast<double>(buffer));
    out.wake += sleeps * stay / std::max(cut, 1e-9) * cheapest(path, static_cast<double>(buffer), levels);
    wakes += sleeps * stay / std::max(cut, 1e-9);
    for (int level = 1; level <= levels; ++level) {
      const double width = static_cast<double>(int64_t{1} << level);
      out.append += merge_seconds(width) / width;
    }
    const double D = static_cast<double>(in_.slot_size);
    const double sweep = static_cast<double>(buffer) * (8.0 * rows_ * D * cols_ * D / flops_ + 1e-6);
    const double paid = E * (1.0 - use_) * in_.itemsize * hidden() * in_.expert_columns / in_.rates.bytes;
    out.flush = n / std::max(in_.flush_every, 1.0) * (paid + sweep);
    out.overhead = in_.rates.lazy_seconds / in_.batch_size + wakes * in_.rates.query_seconds;
    return out;
  }

  Plan plan() const {
    Plan out;
    const Option eager_option = eager();
    out.table.push_back(eager_option);
    out.buffer = std::max<int64_t>(1, in_.buffer);
    if (in_.num_experts == 0 || use_ >= 1.0) return out;
    const double room =
        0.5 * in_.itemsize * (hidden() + 1.0) * in_.expert_columns * static_cast<double>(in_.num_experts);
    Option best;
    for (const char* path : {"replay", "product", "auto"}) {
      Option found;
      for (int64_t buffer = in_.buffer > 0 ? in_.buffer : 8; buffer <= std::max<int64_t>(in_.buffer, 4096);
           buffer *= 2) {
        const int deepest = std::string(path) == "replay" ? 0 : highest_level(buffer);
        for (int levels = 0; levels <= deepest; ++levels) {
          const Option option = lazy(path, buffer, levels);
          const bool fits = in_.buffer > 0 || buffer == 8 || option.tree_bytes <= room;
          if (fits && (found.path.empty() || option.total() < found.total())) found = option;
        }
        if (in_.buffer > 0) break;
      }
      out.table.push_back(found);
      if (best.path.empty() || found.total() < best.total()) best = found;
    }
    out.eager = best.total() > in_.rates.margin * eager_option.total();
    if (out.eager) return out;
    out.buffer = best.buffer;
    out.levels = best.levels;
    if (best.path != "replay") {
      for (int64_t gap = 2; gap <= best.buffer && out.product_from == 0; ++gap) {
        const double g = static_cast<double>(gap);
        if (best.path == "product" || product_seconds(g, best.levels) < replay_seconds(g)) out.product_from = gap;
      }
    }
    return out;
  }

 private:
  static void check(const char* name, int64_t value, int64_t least) {
    if (value < least) {
      throw std::invalid_argument(std::string(name) + " must be at least " + std::to_string(least) + ", got " +
                                  std::to_string(value));
    }
  }

  double hidden() const { return static_cast<double>(in_.num_slots * in_.slot_size); }
  double filled(double slots) const { return std::min(static_cast<double>(in_.num_slots), slots); }

  double apply_flops() const {
    const double D = static_cast<double>(in_.slot_size);
    return 2.0 * (rows_ * D + 1.0) * cols_ * D * in_.expert_columns / flops_;
  }

  double cheapest(const std::string& path, double gap, int levels) const {
    if (path == "replay") return replay_seconds(gap);
    if (path == "product") return product_seconds(gap, levels);
    return std::min(replay_seconds(gap), product_seconds(gap, levels));
  }

  PlannerInput in_;
  double rows_ = 0.0;
  double cols_ = 0.0;
  double use_ = 1.0;
  double flops_ = 1.0;
};

}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_PLANNER_H_
