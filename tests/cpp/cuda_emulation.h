// Runs CUDA kernels on the host, one thread block after the other: the threads of a block are fibers that run one by
// one between barriers. To be included before the kernels, see csrc/cuda/tree_kernels.cu.
//
// What it sees: wrong indices (shared memory is followed by a guard and starts as NaN), barriers that some threads
// leave out, and missing barriers, since the order of the threads can be reversed or shuffled: a race then changes the
// result. What it does not see: anything of warps, banks, alignment and time.
#ifndef SPARSE_RTRL_TESTS_CUDA_EMULATION_H_
#define SPARSE_RTRL_TESTS_CUDA_EMULATION_H_

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulation {

struct Index {
  unsigned x;
};

enum Order { kForward, kReverse, kShuffled };

inline Index thread, block, block_size;
inline unsigned char* shared = nullptr;
inline size_t most_shared_bytes = 227 * 1024;
inline Order order = kForward;
inline ucontext_t scheduler;

struct Fiber {
  ucontext_t context;
  std::vector<unsigned char> stack;
  unsigned index;
  bool done;
};

inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;

inline void barrier() { swapcontext(&current->context, &scheduler); }

inline void enter() {
  (*body)();
  current->done = true;
}

inline void run_block(std::vector<Fiber>& fibers, std::mt19937& generator) {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    makecontext(&fiber.context, &enter, 0);
  }
  std::vector<Fiber*> turns;
  for (Fiber& fiber : fibers) turns.push_back(&fiber);
  if (order == kReverse) std::reverse(turns.begin(), turns.end());
  for (bool done = false; !done;) {
    if (order == kShuffled) std::shuffle(turns.begin(), turns.end(), generator);
    size_t finished = 0;
    for (Fiber* fiber : turns) {
      current = fiber;
      thread.x = fiber->index;
      swapcontext(&scheduler, &fiber->context);
      finished += fiber->done;
    }
    done = finished == fibers.size();
    if (finished > 0 && !done) throw std::runtime_error("some threads of a block missed a barrier");
  }
}

// Runs all blocks of a launch.
inline void run(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  constexpr size_t kGuard = 1024;
  static std::mt19937 generator(0);
  std::vector<Fiber> fibers(threads);
  for (int i = 0; i < threads; ++i) {
    fibers[i].index = i;
    fibers[i].stack.resize(64 * 1024);
  }
  std::vector<unsigned char> memory(shared_bytes + kGuard + 64);
  shared = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  body = &kernel;
  block_size.x = threads;
  for (block.x = 0; block.x < blocks; ++block.x) {
    std::memset(shared, 0xff, shared_bytes + kGuard);
    run_block(fibers, generator);
    for (size_t i = 0; i < kGuard; ++i) {
      if (shared[shared_bytes + i] != 0xff) throw std::runtime_error("a write behind the end of shared memory");
    }
  }
}

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define blockDim emulation::block_size
#define __syncthreads() emulation::barrier()

#define SPARSE_RTRL_SHARED_MEMORY(name) unsigned char* name = emulation::shared
#define SPARSE_RTRL_MOST_SHARED_BYTES() emulation::most_shared_bytes
#define SPARSE_RTRL_LAUNCH(name, kernel, blocks, threads, shared_bytes, stream, ...) \
  ((void)(stream), emulation::run(blocks, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }))

#endif  // SPARSE_RTRL_TESTS_CUDA_EMULATION_H_
