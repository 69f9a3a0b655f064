// Kernels and launches of the operations on rings. The tests compile this file for the host too, with a header that
// defines the words of CUDA and the three macros below.
#include "tree_kernels.cuh"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "tree_launch.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace sparse_rtrl {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Bytes of shared memory that a thread block of the current device can have.
inline size_t most_shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
            void* stream, Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          name);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace cuda
}  // namespace sparse_rtrl

#define SPARSE_RTRL_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define SPARSE_RTRL_MOST_SHARED_BYTES() most_shared_bytes()
#define SPARSE_RTRL_LAUNCH(name, kernel, blocks, threads, shared_bytes, stream, ...) \
  launch(name, kernel, blocks, threads, shared_bytes, stream, __VA_ARGS__)
#endif  // defined(__CUDACC__)

namespace sparse_rtrl {
namespace cuda {

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) write_leaf_kernel(const __grid_constant__ TreeAppend<T> a) {
  SPARSE_RTRL_SHARED_MEMORY(memory);
  write_leaf(a, memory);
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) merge_level_kernel(const __grid_constant__ TreeAppend<T> a, int level) {
  SPARSE_RTRL_SHARED_MEMORY(memory);
  merge_level<T, kColumns>(a, level, memory);
}

__global__ void advance_count_kernel(int64_t* count) { ++*count; }

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) suffix_product_kernel(const __grid_constant__ SuffixProduct<T> p) {
  SPARSE_RTRL_SHARED_MEMORY(memory);
  suffix_product<T, kColumns>(p, memory);
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) catch_up_kernel(const __grid_constant__ CatchUp<T> c) {
  SPARSE_RTRL_SHARED_MEMORY(memory);
  catch_up<T, kColumns>(c, memory);
}

template <typename T>
__global__ void __launch_bounds__(kSweepThreads)
    suffix_loss_rows_kernel(const __grid_constant__ SuffixLossRows<T> s) {
  SPARSE_RTRL_SHARED_MEMORY(memory);
  suffix_loss_rows(s, memory);
}

namespace {

// Widths of a column tile in bytes: the wide one where two thread blocks of it fit a multiprocessor.
constexpr int kWideBytes = 256, kNarrowBytes = 64;

void check_size(const char* name, int64_t blocks, size_t shared_bytes) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(name) + " needs " + std::to_string(blocks) + " thread blocks, at most " +
                             std::to_string(INT32_MAX) + " can be launched: use smaller batches");
  }
  if (shared_bytes > SPARSE_RTRL_MOST_SHARED_BYTES()) {
    throw std::runtime_error(std::string(name) + " needs " + std::to_string(shared_bytes) +
                             " bytes of shared memory for a state of this size, the device has " +
                             std::to_string(SPARSE_RTRL_MOST_SHARED_BYTES()) + ": use backend='reference'");
  }
}

// Calls `body` with an integral constant, the width of the column tiles, and their bytes of shared memory.
template <typename T, typename Body>
void for_tile_width(int64_t num_slots, int64_t slot_size, int64_t num_rows, Body&& body) {
  constexpr int kWide = kWideBytes / sizeof(T), kNarrow = kNarrowBytes / sizeof(T);
  const size_t wide = ColumnTile<T, kWide>::shared_bytes(num_slots, slot_size, num_rows);
  if (2 * wide <= SPARSE_RTRL_MOST_SHARED_BYTES()) {
    body(std::integral_constant<int, kWide>{}, wide);
  } else {
    body(std::integral_constant<int, kNarrow>{}, ColumnTile<T, kNarrow>::shared_bytes(num_slots, slot_size, num_rows));
  }
}

}  // namespace

template <typename T>
void launch_tree_append(const TreeAppend<T>& a, void* stream) {
  const Tree<T>& tree = a.tree;
  if (tree.batch > 0) {
    const int64_t leaves = tree.batch * tree.levels[0].num_rows;
    const size_t bytes = leaf_shared_bytes(tree.num_slots, a.num_write, a.num_support);
    check_size("tree_append_", leaves, bytes);
    SPARSE_RTRL_LAUNCH("tree_append_", (write_leaf_kernel<T>), leaves, kThreads, bytes, stream, a);
    for (int level = 1; level <= tree.highest; ++level) {
      for_tile_width<T>(tree.num_slots, tree.slot_size, tree.levels[level - 1].num_rows, [&](auto width, size_t shared) {
        const int64_t tiles = column_tiles<width>(tree.levels[level].num_cols * tree.slot_size);
        check_size("tree_append_", tree.batch * tiles, shared);
        SPARSE_RTRL_LAUNCH("tree_append_", (merge_level_kernel<T, width>), tree.batch * tiles, kThreads, shared, stream,
                           a, level);
      });
    }
  }
  SPARSE_RTRL_LAUNCH("tree_append_", advance_count_kernel, 1, 1, 0, stream, a.count);
}

template <typename T>
void launch_suffix_product(const SuffixProduct<T>& p, void* stream) {
  if (p.products == 0) return;
  const Tree<T>& tree = p.tree;
  for_tile_width<T>(tree.num_slots, tree.slot_size, tree.levels[tree.highest].num_rows, [&](auto width, size_t shared) {
    const int64_t blocks = p.products * column_tiles<width>(p.num_cols * tree.slot_size);
    check_size("suffix_product", blocks, shared);
    SPARSE_RTRL_LAUNCH("suffix_product", (suffix_product_kernel<T, width>), blocks, kThreads, shared, stream, p);
  });
}

template <typename T>
void launch_catch_up(const CatchUp<T>& c, void* stream) {
  if (c.matrices == 0 || c.columns == 0) return;
  const int64_t num_slots = (c.rows_per_matrix - 1) / c.slot_size;
  for_tile_width<T>(num_slots, c.slot_size, c.ring.num_rows, [&](auto width, size_t shared) {
    const int64_t blocks = c.matrices * column_tiles<width>(c.columns);
    check_size("catch_up_", blocks, shared);
    SPARSE_RTRL_LAUNCH("catch_up_", (catch_up_kernel<T, width>), blocks, kThreads, shared, stream, c);
  });
}

template <typename T>
void launch_suffix_loss_rows(const SuffixLossRows<T>& s, void* stream) {
  if (s.batch == 0 || s.experts == 0) return;
  const size_t bytes = sweep_shared_bytes<T>(s.hidden, s.ring.num_rows, s.ring.num_cols, s.slot_size);
  check_size("suffix_loss_rows", s.batch, bytes);
  SPARSE_RTRL_LAUNCH("suffix_loss_rows", (suffix_loss_rows_kernel<T>), s.batch, kSweepThreads, bytes, stream, s);
}

template void launch_tree_append<float>(const TreeAppend<float>&, void*);
template void launch_tree_append<double>(const TreeAppend<double>&, void*);
template void launch_suffix_product<float>(const SuffixProduct<float>&, void*);
template void launch_suffix_product<double>(const SuffixProduct<double>&, void*);
template void launch_catch_up<float>(const CatchUp<float>&, void*);
template void launch_catch_up<double>(const CatchUp<double>&, void*);
template void launch_suffix_loss_rows<float>(const SuffixLossRows<float>&, void*);
template void launch_suffix_loss_rows<double>(const SuffixLossRows<double>&, void*);

}  // namespace cuda
}  // namespace sparse_rtrl
