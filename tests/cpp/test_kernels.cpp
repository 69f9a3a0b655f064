// The kernels of one instruction set against plain loops in double precision.
#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

using namespace sparse_rtrl;  // NOLINT

namespace {

const Parallel kSerial{[](int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  // Two ranges, so that a task that leaves something behind for the next one is seen.
  body(context, 0, count / 2);
  body(context, count / 2, count);
}};

std::mt19937 generator(0);

template <typename T>
std::vector<T> random_numbers(size_t size) {
  std::normal_distribution<double> normal;
  std::vector<T> out(size);
  for (T& x : out) x = static_cast<T>(normal(generator));
  return out;
}

// Sorted distinct slots.
std::vector<int64_t> random_slots(int64_t num_slots, int64_t k) {
  std::vector<int64_t> all(num_slots);
  for (int64_t i = 0; i < num_slots; ++i) all[i] = i;
  std::shuffle(all.begin(), all.end(), generator);
  all.resize(k);
  std::sort(all.begin(), all.end());
  return all;
}

template <typename T>
void influence_update(int64_t D, int64_t kw, int64_t ks, int64_t m, int64_t J, bool with_loss) {
  const int64_t S = 5, H = S * D, w = kw * D, r = ks * D, tau = 2;
  const int64_t N = 3 + m * J + m + 5;  // odd columns around a weight and a bias
  std::vector<T> P = random_numbers<T>(2 * (H + 1) * N), Jh = random_numbers<T>(w * r), u = random_numbers<T>(r);
  const std::vector<T> before = P, delta = random_numbers<T>(w * tau * m), z = random_numbers<T>(tau * J);
  const std::vector<T> bias = random_numbers<T>(w * m), one(1, T{1});
  const std::vector<int64_t> write = random_slots(S, kw), support = random_slots(S, ks), stream{0}, group{1};
  const ImmediateTerm<T> terms[] = {{delta.data(), z.data(), tau, m, J, 3},
                                    {bias.data(), one.data(), 1, m, 1, 3 + m * J}};
  kernels<T>().influence_update(
      {P.data(), H + 1, N, Jh.data(), write.data(), support.data(), with_loss ? u.data() : nullptr, 1, kw, ks, D,
       stream.data(), group.data(), 1, terms, 2},
      kSerial);
  std::vector<double> expected(before.begin(), before.end());
  const int64_t base = (H + 1) * N;
  for (int64_t c = 0; c < N; ++c) {
    for (int64_t i = 0; i <= w; ++i) {
      double sum = 0.0;
      for (int64_t k = 0; k < r; ++k) {
        sum += double{i < w ? Jh[i * r + k] : u[k]} * before[base + (support[k / D] * D + k % D) * N + c];
      }
      if (i == w) {
        if (with_loss) expected[base + H * N + c] += sum;
        continue;
      }
      const int64_t x = c - 3;
      if (x >= 0 && x < m * J) {
        for (int64_t t = 0; t < tau; ++t) sum += double{delta[(i * tau + t) * m + x / J]} * z[t * J + x % J];
      } else if (x >= m * J && x < m * J + m) {
        sum += bias[i * m + x - m * J];
      }
      expected[base + (write[i / D] * D + i % D) * N + c] = sum;
    }
  }
  const double tolerance = sizeof(T) == 4 ? 1e-4 : 1e-12;
  for (size_t i = 0; i < P.size(); ++i) {
    CHECK(std::abs(P[i] - expected[i]) <= tolerance * (1.0 + std::abs(expected[i])), << i << ": " << P[i]);
  }
}

// Replay of segments, their merged product applied once, and the loss rows of suffixes agree.
template <typename T>
void catch_up(int64_t D) {
  const int64_t S = 4, H = S * D, N = 37, segments = 5;
  std::vector<std::vector<int64_t>> rows, cols;
  std::vector<std::vector<T>> blocks, loss_rows;
  std::vector<NodeBatch<T>> nodes;
  for (int64_t i = 0; i < segments; ++i) {
    cols.push_back(random_slots(S, 1 + i % S));
    rows.emplace_back(cols.back().begin(), cols.back().begin() + (cols.back().size() + 1) / 2);
    blocks.push_back(random_numbers<T>(rows.back().size() * cols.back().size() * D * D));
    loss_rows.push_back(random_numbers<T>(cols.back().size() * D));
    nodes.push_back({rows[i].data(), cols[i].data(), blocks[i].data(), loss_rows[i].data(),
                     static_cast<int64_t>(rows[i].size()), static_cast<int64_t>(cols[i].size()), D});
  }
  std::vector<T> P = random_numbers<T>((H + 1) * N), same = P;
  const std::vector<T> before = P;
  const std::vector<int64_t> zero{0}, path{0, 1, 2, 3, 4};
  kernels<T>().catch_up({P.data(), H + 1, N, nodes.data(), segments, 1, zero.data(), zero.data(), zero.data(), 1, D},
                        kSerial);
  std::vector<int64_t> out_rows(S), out_cols(S);
  std::vector<T> out_blocks(H * H), out_u(H);
  kernels<T>().suffix_product({nodes.data(),
                               zero.data(),
                               path.data(),
                               1,
                               segments,
                               S,
                               D,
                               {out_rows.data(), out_cols.data(), out_blocks.data(), out_u.data(), S, S}},
                              kSerial);
  kernels<T>().influence_update({same.data(), H + 1, N, out_blocks.data(), out_rows.data(), out_cols.data(),
                                 out_u.data(), 1, S, S, D, zero.data(), zero.data(), 1, nullptr, 0},
                                kSerial);
  const double tolerance = sizeof(T) == 4 ? 1e-4 : 1e-12;
  double scale = 1.0, moved = 0.0;
  for (const T x : P) scale = std::max(scale, std::abs(double{x}));
  for (size_t i = 0; i < P.size(); ++i) {
    CHECK(std::abs(P[i] - same[i]) <= tolerance * scale, << P[i] << " " << same[i]);
    moved = std::max(moved, std::abs(double{P[i]} - before[i]));
  }
  CHECK(moved > 1.0);
  std::vector<T> sweep(H), newest(H, T{0});
  kernels<T>().suffix_loss_rows({nodes.data(), segments, zero.data(), newest.data(), sweep.data(), 1, 1, H}, kSerial);
  std::vector<T> gained = before;
  kernels<T>().loss_row({gained.data(), H + 1, N, sweep.data(), zero.data(), 1}, kSerial);
  for (int64_t c = 0; c < N; ++c) CHECK(std::abs(gained[H * N + c] - P[H * N + c]) <= tolerance * scale);
}

template <typename T>
void all() {
  for (const int64_t D : {1, 3, 16, 33}) {
    for (const int64_t kw : {0, 1, 2, 5}) {
      for (const int64_t J : {1, 2, 31, 64}) {
        for (const bool with_loss : {false, true}) influence_update<T>(D, kw, 5, 3, J, with_loss);
      }
    }
    catch_up<T>(D);
  }
}

}  // namespace

int main() {
  try {
    kernels<float>();
  } catch (const std::runtime_error& error) {
    std::cerr << error.what() << std::endl;
    return 77;  // not on this processor
  }
  all<float>();
  all<double>();
  return 0;
}
