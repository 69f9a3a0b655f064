// The CUDA kernels behind the operations on rings of sparse_rtrl/ops/dispatch.py, through torch's stable ABI. They go to torch's
// current stream, wait for nothing and allocate only what they return.
#ifndef USE_CUDA
#define USE_CUDA  // for the stream in torch's C shim
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../tree_operations.h"
#include "tree_launch.h"

namespace sparse_rtrl {
namespace {

// Makes the device of a tensor current, and knows its stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// The kernels of the tree on a CUDA device; the values of indices stay there unread.
struct Cuda {
  static constexpr bool kReadsValues = false;

  template <typename T>
  static void tree_append(const TreeAppend<T>& arguments, const Tensor& like) {
    cuda::launch_tree_append<T>(arguments, OnDevice(like).stream());
  }
  template <typename T>
  static void suffix_product(const SuffixProduct<T>& arguments, const Tensor& like) {
    cuda::launch_suffix_product<T>(arguments, OnDevice(like).stream());
  }
  template <typename T>
  static void catch_up(const CatchUp<T>& arguments, const Tensor& like) {
    cuda::launch_catch_up<T>(arguments, OnDevice(like).stream());
  }
  template <typename T>
  static void suffix_loss_rows(const SuffixLossRows<T>& arguments, const Tensor& like) {
    cuda::launch_suffix_loss_rows<T>(arguments, OnDevice(like).stream());
  }
};

}  // namespace
}  // namespace sparse_rtrl

STABLE_TORCH_LIBRARY_IMPL(sparse_rtrl, CUDA, m) {
  m.impl("tree_append_", TORCH_BOX(&sparse_rtrl::tree_append_<sparse_rtrl::Cuda>));
  m.impl("suffix_product", TORCH_BOX(&sparse_rtrl::suffix_product<sparse_rtrl::Cuda>));
  m.impl("catch_up_", TORCH_BOX(&sparse_rtrl::catch_up_<sparse_rtrl::Cuda>));
  m.impl("suffix_loss_rows", TORCH_BOX(&sparse_rtrl::suffix_loss_rows<sparse_rtrl::Cuda>));
}
