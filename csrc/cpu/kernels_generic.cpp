// The CPU kernels for any processor.
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

#define SPARSE_RTRL_ISA generic
#define SPARSE_RTRL_ISA_NAME "generic"
#define SPARSE_RTRL_VECTOR_BYTES 16
#define SPARSE_RTRL_PANEL_ROWS 4
#include "tile_kernels.inc"
