// The CUDA operations on rings, emulated on the host, as C functions that the Python tests call.
#include "cuda_emulation.h"

#include "../../csrc/cuda/tree_kernels.cu"

namespace {

std::string problem;

// Runs `body` and keeps the message of what it throws.
template <typename Body>
const char* guarded(Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

template <typename T>
sparse_rtrl::Ring<T> ring_of(void* const* tensors, const int64_t* sizes) {
  return {static_cast<int64_t*>(tensors[0]), static_cast<int64_t*>(tensors[1]), static_cast<T*>(tensors[2]),
          static_cast<T*>(tensors[3]),       sizes[0],                          sizes[1],
          sizes[2]};
}

// `tensors` holds four pointers, `sizes` three numbers per level.
template <typename T>
sparse_rtrl::Tree<T> tree_of(int levels, void* const* tensors, const int64_t* sizes, int64_t batch, int64_t num_slots,
                             int64_t slot_size) {
  sparse_rtrl::Tree<T> tree{};
  for (int i = 0; i < levels; ++i) tree.levels[i] = ring_of<T>(tensors + 4 * i, sizes + 3 * i);
  tree.highest = levels - 1;
  tree.batch = batch;
  tree.num_slots = num_slots;
  tree.slot_size = slot_size;
  return tree;
}

}  // namespace

extern "C" void set_emulation(int order, int64_t most_shared_bytes) {
  emulation::order = static_cast<emulation::Order>(order);
  emulation::most_shared_bytes = static_cast<size_t>(most_shared_bytes);
}

#define SPARSE_RTRL_EMULATED(T, suffix)                                                                                \
  extern "C" const char* tree_append_##suffix(int levels, void* const* tensors, const int64_t* sizes, int64_t batch,   \
                                              int64_t num_slots, int64_t slot_size, int64_t* count, int64_t first,     \
                                              const T* Jh, const int64_t* write, const int64_t* support,               \
                                              const T* loss_row, int64_t kw, int64_t ks) {                             \
    return guarded([&] {                                                                                               \
      sparse_rtrl::cuda::launch_tree_append<T>({tree_of<T>(levels, tensors, sizes, batch, num_slots, slot_size),       \
                                                count, first, Jh, write, support, loss_row, kw, ks},                   \
                                               nullptr);                                                               \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" const char* suffix_product_##suffix(                                                                      \
      int levels, void* const* tensors, const int64_t* sizes, int64_t batch, int64_t num_slots, int64_t slot_size,     \
      const int64_t* count, const int64_t* streams, const int64_t* starts, int64_t products, int64_t* rows,            \
      int64_t* cols, T* blocks, T* loss_rows, int64_t num_rows, int64_t num_cols) {                                    \
    return guarded([&] {                                                                                               \
      sparse_rtrl::cuda::launch_suffix_product<T>({tree_of<T>(levels, tensors, sizes, batch, num_slots, slot_size),    \
                                                   count, streams, starts, products, rows, cols, blocks, loss_rows,    \
                                                   num_rows, num_cols},                                                \
                                                  nullptr);                                                            \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" const char* catch_up_##suffix(void* const* tensors, const int64_t* sizes, int64_t batch, T* P,            \
                                           int64_t rows_per_matrix, int64_t columns, int64_t slot_size,                \
                                           const int64_t* count, const int64_t* streams, const int64_t* groups,        \
                                           const int64_t* starts, int64_t matrices) {                                  \
    return guarded([&] {                                                                                               \
      sparse_rtrl::cuda::launch_catch_up<T>({P, rows_per_matrix, columns, ring_of<T>(tensors, sizes), batch,           \
                                             slot_size, count, streams, groups, starts, matrices},                     \
                                            nullptr);                                                                  \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" const char* suffix_loss_rows_##suffix(void* const* tensors, const int64_t* sizes, int64_t batch,          \
                                                   int64_t slot_size, int64_t hidden, const int64_t* count,            \
                                                   const int64_t* starts, const T* newest, T* out, int64_t experts) {  \
    return guarded([&] {                                                                                               \
      sparse_rtrl::cuda::launch_suffix_loss_rows<T>(                                                                   \
          {ring_of<T>(tensors, sizes), batch, slot_size, hidden, count, starts, newest, out, experts}, nullptr);       \
    });                                                                                                                \
  }

SPARSE_RTRL_EMULATED(float, f32)
SPARSE_RTRL_EMULATED(double, f64)
