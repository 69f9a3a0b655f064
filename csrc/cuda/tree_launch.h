// Launches of the CUDA kernels of tree_kernels.cuh, free of torch. Nothing is allocated and nothing waits: every launch
// goes to `stream`, a cudaStream_t of the current device, and can be captured in a CUDA graph. All pointers are device
// pointers; indices are not checked. Throws std::runtime_error where a launch is refused.
#ifndef SPARSE_RTRL_CUDA_TREE_LAUNCH_H_
#define SPARSE_RTRL_CUDA_TREE_LAUNCH_H_

#include "../rings.h"

namespace sparse_rtrl {
namespace cuda {

template <typename T>
void launch_tree_append(const TreeAppend<T>& arguments, void* stream);

template <typename T>
void launch_suffix_product(const SuffixProduct<T>& arguments, void* stream);

template <typename T>
void launch_catch_up(const CatchUp<T>& arguments, void* stream);

template <typename T>
void launch_suffix_loss_rows(const SuffixLossRows<T>& arguments, void* stream);

}  // namespace cuda
}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_CUDA_TREE_LAUNCH_H_
