// Checks of the tensors that operations get, through torch's stable ABI; on the CPU of their indices too.
#ifndef SPARSE_RTRL_TENSOR_CHECKS_H_
#define SPARSE_RTRL_TENSOR_CHECKS_H_

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace sparse_rtrl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string out = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) out += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return out + ")";
}

[[noreturn]] inline void fail(const std::string& name, const std::string& expected, const Tensor& got) {
  throw std::invalid_argument(name + " must " + expected + ", got " + torch::headeronly::toString(got.scalar_type()) +
                              " " + shape_of(got));
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A contiguous tensor of the given dtype and shape (-1: any size) on the device of `like`.
inline Tensor checked(const std::string& name, const Tensor& tensor, const Tensor& like, ScalarType dtype,
                      const std::vector<int64_t>& shape) {
  bool fits = tensor.scalar_type() == dtype && tensor.is_cpu() == like.is_cpu() &&
              tensor.get_device_index() == like.get_device_index() &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = shape[i] < 0 || tensor.size(static_cast<int64_t>(i)) == shape[i];
  }
  if (!fits) {
    std::string wanted;
    for (const int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
    const std::string device = like.is_cpu() ? "the CPU" : "CUDA device " + std::to_string(like.get_device_index());
    fail(name, std::string("be ") + torch::headeronly::toString(dtype) + " of shape (" + wanted + ") on " + device,
         tensor);
  }
  return as_contiguous(tensor);
}

// As `checked`, for a tensor that is written in place.
inline Tensor checked_in_place(const std::string& name, const Tensor& tensor, const Tensor& like, ScalarType dtype,
                               const std::vector<int64_t>& shape) {
  checked(name, tensor, like, dtype, shape);
  if (!tensor.is_contiguous()) fail(name, "be contiguous", tensor);
  return tensor;
}

inline const int64_t* indices(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

// As `checked`, for indices from 0 to limit - 1; on a GPU their values are not read.
inline Tensor checked_indices(const std::string& name, const Tensor& tensor, const Tensor& like,
                              const std::vector<int64_t>& shape, int64_t limit) {
  Tensor out = checked(name, tensor, like, ScalarType::Long, shape);
  if (!out.is_cpu()) return out;
  const int64_t* values = indices(out);
  for (int64_t i = 0; i < out.numel(); ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      throw std::out_of_range(name + " must lie in 0 ... " + std::to_string(limit - 1) + ", got " +
                              std::to_string(values[i]));
    }
  }
  return out;
}

template <typename T>
const T* numbers(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline void check_influence(const Tensor& P) {
  const bool known = P.scalar_type() == ScalarType::Float || P.scalar_type() == ScalarType::Double;
  if (!known || P.dim() != 3 || P.size(1) < 1 || !P.is_contiguous()) {
    fail("P", "be contiguous float32 or float64 of shape (G, H + 1, N)", P);
  }
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

}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_TENSOR_CHECKS_H_
