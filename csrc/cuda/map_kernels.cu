// Entry points of the CUDA kernels for float32 and float64. Compiled for sm_80 and sm_90 as a test; a machine without a
// GPU can do that.
#include "map_kernels.cuh"

namespace sparse_rtrl {
namespace cuda {

template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

#define SPARSE_RTRL_KERNELS(T, suffix)                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                         \
      merge_level_##suffix(Tree<T> tree, int level, const int64_t* count, int64_t first) {                       \
    merge_level(tree, level, count, first);                                                                      \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                         \
      suffix_product_##suffix(Tree<T> tree, const int64_t* streams, const int64_t* starts, const int64_t* count, \
                              int64_t* slots_0, T* numbers_0, int64_t* slots_1, T* numbers_1) {                  \
    suffix_product(tree, streams, starts, count, slots_0, numbers_0, slots_1, numbers_1);                        \
  }                                                                                                              \
  /* Dynamic shared memory: (H + 1 + w + 1) * kColumns numbers. */                                               \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                         \
      catch_up_##suffix(Tree<T> tree, T* P, int64_t columns, const int64_t* streams, const int64_t* groups,      \
                        const int64_t* starts, const int64_t* count) {                                           \
    T* tile = shared_memory<T>();                                                                                \
    catch_up(tree, P, columns, streams, groups, starts, count, tile,                                             \
             tile + (tree.num_slots * tree.slot_size + 1) * kColumns);                                           \
  }

SPARSE_RTRL_KERNELS(float, f32)
SPARSE_RTRL_KERNELS(double, f64)

}  // namespace cuda
}  // namespace sparse_rtrl
