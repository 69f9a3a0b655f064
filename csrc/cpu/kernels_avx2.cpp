// The CPU kernels for processors with AVX2 and FMA.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define SPARSE_RTRL_ISA avx2
#define SPARSE_RTRL_ISA_NAME "avx2"
#define SPARSE_RTRL_VECTOR_BYTES 32
#define SPARSE_RTRL_PANEL_ROWS 6
#include "tile_kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // defined(__x86_64__)
