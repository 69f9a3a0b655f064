// The planner and the dyadic arithmetic for Python, as sparse_rtrl._planner.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "planner.h"

namespace {

namespace py = pybind11;

py::dict plan(int64_t num_slots, int64_t slot_size, int64_t read_slots, int64_t write_slots, int64_t num_experts,
              int64_t top_k, int64_t expert_columns, int64_t batch_size, int64_t commit_every, double flush_every,
              int64_t buffer, int64_t itemsize, double flops, double bytes, double lazy_seconds, double query_seconds,
              double margin) {
  sparse_rtrl::PlannerInput in;
  in.num_slots = num_slots;
  in.slot_size = slot_size;
  in.read_slots = read_slots;
  in.write_slots = write_slots;
  in.num_experts = num_experts;
  in.top_k = top_k;
  in.expert_columns = expert_columns;
  in.batch_size = batch_size;
  in.commit_every = commit_every;
  in.flush_every = flush_every;
  in.buffer = buffer;
  in.itemsize = itemsize;
  in.rates = {flops, bytes, lazy_seconds, query_seconds, margin};
  const sparse_rtrl::Plan found = sparse_rtrl::Planner(in).plan();
  py::list table;
  for (const sparse_rtrl::Option& option : found.table) {
    py::dict row;
    row["path"] = option.path;
    row["buffer"] = option.buffer;
    row["levels"] = option.levels;
    row["wake"] = option.wake;
    row["append"] = option.append;
    row["flush"] = option.flush;
    row["overhead"] = option.overhead;
    row["total"] = option.total();
    row["tree_bytes"] = option.tree_bytes;
    table.append(row);
  }
  py::dict out;
  out["eager"] = found.eager;
  out["buffer"] = found.buffer;
  out["levels"] = found.levels;
  out["product_from"] = found.product_from;
  out["table"] = table;
  return out;
}

std::vector<std::pair<int, int64_t>> cover(int64_t start, int64_t count, int levels) {
  std::vector<std::pair<int, int64_t>> out;
  for (int64_t position = start; position < count;) {
    const sparse_rtrl::NodeId node = sparse_rtrl::covering_node(position, count, levels);
    out.emplace_back(node.level, node.index);
    position += int64_t{1} << node.level;
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  const sparse_rtrl::MachineRates rates;
  m.def("plan", &plan, py::kw_only(), py::arg("num_slots"), py::arg("slot_size"), py::arg("read_slots"),
        py::arg("write_slots"), py::arg("num_experts"), py::arg("top_k"), py::arg("expert_columns"),
        py::arg("batch_size"), py::arg("commit_every"), py::arg("flush_every"), py::arg("buffer"), py::arg("itemsize"),
        py::arg("flops") = rates.flops, py::arg("bytes") = rates.bytes, py::arg("lazy_seconds") = rates.lazy_seconds,
        py::arg("query_seconds") = rates.query_seconds, py::arg("margin") = rates.margin);
  m.def("cover", &cover, py::arg("start"), py::arg("count"), py::arg("levels"));
  m.def("completed_levels", &sparse_rtrl::completed_levels, py::arg("count"), py::arg("first"), py::arg("levels"));
  m.def("highest_level", &sparse_rtrl::highest_level, py::arg("capacity"));
}
