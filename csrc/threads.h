// Torch's threads for the CPU kernels.
#ifndef SPARSE_RTRL_THREADS_H_
#define SPARSE_RTRL_THREADS_H_

#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"

namespace sparse_rtrl {

inline const Parallel kThreads{[](int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= grain) {
    body(context, 0, count);
  } else {
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }
}};

}  // namespace sparse_rtrl

#endif  // SPARSE_RTRL_THREADS_H_
