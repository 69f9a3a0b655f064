// The row tape behind the operation rows_back_ of sparse_rtrl/ops/dispatch.py, through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "tensor_checks.h"
#include "threads.h"

namespace sparse_rtrl {
namespace {

constexpr int64_t kFields = 8;  // of an instruction

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("program must " + what); }

// An operand as it is given: contiguous, with one line in all, one for each step, or one for each step and stream.
struct Operand {
  Tensor tensor;
  int64_t size = 0;  // numbers of a line
  int64_t step = 0;
  int64_t stream = 0;

  Operand(const std::string& name, const Tensor& given, ScalarType dtype, int64_t steps, int64_t batch)
      : tensor(as_contiguous(given)) {
    const int64_t lines = tensor.dim() > 0 ? tensor.size(0) : 0;
    if (tensor.scalar_type() != dtype || !tensor.is_cpu() || (lines != 1 && lines != steps && lines != steps * batch)) {
      fail(name, "have 1, steps or steps * B lines on the CPU, in their dtype", tensor);
    }
    size = tensor.numel() / lines;
    if (lines == 1) return;
    step = lines == steps ? size : size * batch;
    stream = lines == steps ? 0 : size;
  }

  template <typename T>
  TapeOperand<T> as() const {
    return {static_cast<const T*>(tensor.const_data_ptr()), step, stream};
  }
};

const Operand& chosen(const std::vector<Operand>& operands, int64_t number) {
  if (number < 0 || number >= static_cast<int64_t>(operands.size())) {
    refuse("name operands from 0 to " + std::to_string(static_cast<int64_t>(operands.size()) - 1) + ", got " +
           std::to_string(number));
  }
  return operands[static_cast<size_t>(number)];
}

void check_places(const Operand& operand, int64_t entries, int64_t limit) {
  if (operand.size != entries) refuse("give every combination as many places as entries");
  const int32_t* values = static_cast<const int32_t*>(operand.tensor.const_data_ptr());
  for (int64_t i = 0; i < operand.tensor.numel(); ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      throw std::out_of_range("index must lie in 0 ... " + std::to_string(limit - 1) + ", got " +
                              std::to_string(values[i]));
    }
  }
}

void check_range(int64_t first, int64_t count, int64_t rows) {
  if (first < 0 || count < 0 || first > rows - count) refuse("stay within the workspace of " + std::to_string(rows));
}

template <typename T>
TapeInstruction<T> instruction(const int64_t* line, const std::vector<Operand>& index,
                               const std::vector<Operand>& numbers_given, int64_t rows) {
  TapeInstruction<T> out{};
  out.product = line[0] == 1;
  out.out = line[1];
  if (!out.product) {
    out.rows = line[2];
    out.entries = line[3];
    const Operand &dst = chosen(index, line[4]), &src = chosen(index, line[5]);
    check_range(out.out, out.rows, rows);
    check_places(dst, out.entries, out.rows);
    check_places(src, out.entries, rows);
    out.dst = dst.as<int32_t>();
    out.src = src.as<int32_t>();
    if (line[6] >= 0) {
      const Operand& coefficient = chosen(numbers_given, line[6]);
      if (coefficient.size != out.entries) refuse("give every combination as many coefficients as entries");
      out.coefficient = coefficient.as<T>();
    }
    out.sorted = line[7] != 0;
    return out;
  }
  out.source = line[2];
  out.positions = line[3];
  out.matrices = line[4];
  out.inner = line[5];
  out.outer = line[6];
  const Operand& matrix = chosen(numbers_given, line[7]);
  if (out.matrices < 1 || out.positions % out.matrices != 0) refuse("divide positions by matrices");
  if (out.inner < 0 || out.outer < 0 || matrix.size != out.matrices * out.inner * out.outer) {
    refuse("give every product its matrices");
  }
  check_range(out.source, out.positions * out.inner, rows);
  check_range(out.out, out.positions * out.outer, rows);
  out.matrix = matrix.as<T>();
  return out;
}

void rows_back_(Tensor v, Tensor deltas, Tensor program, std::vector<Tensor> index, std::vector<Tensor> numbers_given,
                std::optional<Tensor> cotangents, std::vector<int64_t> taps, int64_t steps, int64_t batch,
                int64_t stream, int64_t rows, int64_t before) {
  const ScalarType dtype = v.scalar_type();
  v = checked_in_place("v", v, v, dtype, {-1, -1, -1});
  const int64_t count = v.size(0), width = v.size(1), hidden = v.size(2);
  if (steps < 1) throw std::invalid_argument("steps must be at least 1, got " + std::to_string(steps));
  if (stream < 0 || stream > batch - count) {
    throw std::out_of_range("stream must leave room for " + std::to_string(count) + " of " + std::to_string(batch) +
                            " streams, got " + std::to_string(stream));
  }
  program = checked("program", program, v, ScalarType::Long, {-1, kFields});
  if (cotangents.has_value()) cotangents = checked("cotangents", *cotangents, v, dtype, {steps, batch, hidden});
  if (taps.size() % 3 != 0) throw std::invalid_argument("taps must be triples of row, tau and m");
  check_range(0, hidden, rows);
  check_range(before, hidden, rows);
  std::vector<Operand> places, values;
  for (const Tensor& t : index) places.emplace_back("index", t, ScalarType::Int, steps, batch);
  for (const Tensor& t : numbers_given) values.emplace_back("numbers", t, dtype, steps, batch);
  int64_t total = 0;
  for (size_t i = 0; i < taps.size(); i += 3) {
    check_range(taps[i], taps[i + 1] * taps[i + 2], rows);
    total += count * steps * taps[i + 1] * taps[i + 2] * width;
  }
  deltas = checked_in_place("deltas", deltas, v, dtype, {total});
  for_scalar_type("v", v, [&](auto scalar) {
    using T = decltype(scalar);
    std::vector<TapeInstruction<T>> instructions;
    for (int64_t k = 0; k < program.size(0); ++k) {
      instructions.push_back(instruction<T>(indices(program) + k * program.size(1), places, values, rows));
    }
    std::vector<Tap<T>> kept;
    T* out = static_cast<T*>(deltas.mutable_data_ptr());
    for (size_t i = 0; i < taps.size(); i += 3) {
      const int64_t entries = taps[i + 1] * taps[i + 2];
      kept.push_back({taps[i], entries, out});
      out += count * steps * entries * width;
    }
    kernels<T>().rows_back(
        {static_cast<T*>(v.mutable_data_ptr()), cotangents.has_value() ? numbers<T>(*cotangents) : nullptr, batch,
         stream, count, width, hidden, steps, rows, before, instructions.data(), static_cast<int64_t>(instructions.size()),
         kept.data(), static_cast<int64_t>(kept.size())},
        kThreads);
  });
}

}  // namespace
}  // namespace sparse_rtrl

STABLE_TORCH_LIBRARY_IMPL(sparse_rtrl, CPU, m) { m.impl("rows_back_", TORCH_BOX(&sparse_rtrl::rows_back_)); }
