// Choice of the instruction set at run time.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace sparse_rtrl {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return has_avx2() && __builtin_cpu_supports("avx512f"); }
#endif

template <typename T>
const Kernels<T>& choose() {
  const char* wanted = std::getenv("SPARSE_RTRL_CPU");
  const std::string name = wanted == nullptr ? "" : wanted;
  if (name == "generic") return generic::table<T>();
#if defined(__x86_64__)
  if ((name == "avx512" || name.empty()) && has_avx512()) return avx512::table<T>();
  if ((name == "avx2" || name.empty()) && has_avx2()) return avx2::table<T>();
#endif
  if (!name.empty()) {
    throw std::runtime_error(
        "SPARSE_RTRL_CPU must name instructions that this processor has, generic, avx2 or avx512; got " + name);
  }
  return generic::table<T>();
}

}  // namespace

template <typename T>
const Kernels<T>& kernels() {
  static const Kernels<T>& chosen = choose<T>();
  return chosen;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace sparse_rtrl
