// The kernels of one instruction set against plain loops in double precision.
#include <algorithm>
#include <cmath>
#include <complex>
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

// A tree in memory of its own.
template <typename T>
struct OwnTree {
  std::vector<std::vector<int64_t>> slots;
  std::vector<std::vector<T>> numbers;
  Tree<T> tree;

  OwnTree(int64_t capacity, int64_t num_slots, int64_t slot_size, int64_t num_rows, int64_t num_cols) {
    tree.highest = highest_level(capacity);
    tree.batch = 1;
    tree.num_slots = num_slots;
    tree.slot_size = slot_size;
    for (int level = 0; level <= tree.highest; ++level) {
      const int64_t length = capacity >> level;
      const int64_t R = std::min(num_slots, num_rows << level), C = std::min(num_slots, num_cols << level);
      slots.emplace_back(length * R);
      slots.emplace_back(length * C);
      numbers.emplace_back(length * R * C * slot_size * slot_size);
      numbers.emplace_back(length * C * slot_size);
      const size_t n = slots.size();
      tree.levels[level] = {slots[n - 2].data(),   slots[n - 1].data(), numbers[n - 2].data(),
                            numbers[n - 1].data(), length,              R,
                            C};
    }
  }
};

// Replay of segments, their merged product applied once, and the loss rows of suffixes agree.
template <typename T>
void catch_up(int64_t D) {
  const int64_t S = 4, H = S * D, N = 37, capacity = 6;
  OwnTree<T> own(capacity, S, D, 2, S);
  int64_t count = 0;
  for (int64_t i = 0; i < 15; ++i) {
    const std::vector<int64_t> cols = random_slots(S, 1 + i % S);
    const std::vector<int64_t> rows(cols.begin(), cols.begin() + std::min<int64_t>(2, (cols.size() + 1) / 2));
    std::vector<T> Jh = random_numbers<T>(rows.size() * cols.size() * D * D), u(H, T{0});
    for (const int64_t slot : cols) {
      const std::vector<T> part = random_numbers<T>(D);
      std::copy(part.begin(), part.end(), u.begin() + slot * D);
    }
    for (T& x : Jh) x /= static_cast<T>(std::sqrt(static_cast<double>(cols.size() * D)));
    kernels<T>().tree_append({own.tree, &count, 0, Jh.data(), rows.data(), cols.data(), u.data(),
                              static_cast<int64_t>(rows.size()), static_cast<int64_t>(cols.size())},
                             kSerial);
  }
  CHECK(count == 15);
  std::vector<T> P = random_numbers<T>((H + 1) * N), same = P;
  const std::vector<T> before = P;
  const std::vector<int64_t> zero{0}, start{count - capacity};
  kernels<T>().catch_up({P.data(), H + 1, N, own.tree.levels[0], 1, D, &count, zero.data(), zero.data(), start.data(),
                         1},
                        kSerial);
  std::vector<int64_t> out_rows(S), out_cols(S);
  std::vector<T> out_blocks(H * H), out_u(H);
  kernels<T>().suffix_product({own.tree, &count, zero.data(), start.data(), 1, out_rows.data(), out_cols.data(),
                               out_blocks.data(), out_u.data(), S, S},
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
  CHECK(moved > 0.5);
  std::vector<T> sweep(H), newest(H, T{0});
  kernels<T>().suffix_loss_rows({own.tree.levels[0], 1, D, H, &count, start.data(), newest.data(), sweep.data(), 1},
                                kSerial);
  std::vector<T> gained = before;
  kernels<T>().loss_row({gained.data(), H + 1, N, sweep.data(), zero.data(), 1}, kSerial);
  for (int64_t c = 0; c < N; ++c) CHECK(std::abs(gained[H * N + c] - P[H * N + c]) <= tolerance * scale);
}

// Entries as complex numbers, whatever they are.
template <typename T>
std::complex<double> entry(const std::vector<T>& numbers, int64_t i, bool complex_numbers) {
  if (complex_numbers) return {numbers[2 * i], numbers[2 * i + 1]};
  return numbers[i];
}

template <typename T>
void diagonal(int64_t R, int64_t J, int64_t tau, bool complex_numbers) {
  const int64_t B = 2, size = complex_numbers ? 2 : 1;
  std::vector<T> P = random_numbers<T>(size * B * R * J), g = random_numbers<T>(size * R * J);
  const std::vector<T> decay = random_numbers<T>(size * B * R), delta = random_numbers<T>(size * B * R * tau);
  const std::vector<T> z = random_numbers<T>(B * tau * J), u = random_numbers<T>(size * B * R);
  const std::vector<T> before = P, g_before = g;
  std::vector<T> loss = g;
  const DiagonalUpdate<T> of_loss{P.data(), nullptr, nullptr, nullptr, loss.data(), u.data(), B, R, J, 0, complex_numbers};
  kernels<T>().diagonal_loss(of_loss, kSerial);
  for (size_t i = 0; i < P.size(); ++i) CHECK(P[i] == before[i]);
  kernels<T>().diagonal_update(
      {P.data(), decay.data(), delta.data(), z.data(), g.data(), u.data(), B, R, J, tau, complex_numbers}, kSerial);
  std::vector<T> without = before;
  kernels<T>().diagonal_update(
      {without.data(), decay.data(), delta.data(), z.data(), nullptr, nullptr, B, R, J, tau, complex_numbers}, kSerial);
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-13;
  const auto near = [&](std::complex<double> a, std::complex<double> b) {
    return std::abs(a - b) <= tolerance * (1.0 + std::abs(b));
  };
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t j = 0; j < J; ++j) {
      std::complex<double> gain = entry(g_before, r * J + j, complex_numbers);
      for (int64_t b = 0; b < B; ++b) {
        const int64_t row = b * R + r;
        const std::complex<double> old = entry(before, row * J + j, complex_numbers);
        std::complex<double> moved = entry(decay, row, complex_numbers) * old;
        for (int64_t t = 0; t < tau; ++t) {
          moved += entry(delta, row * tau + t, complex_numbers) * static_cast<double>(z[(b * tau + t) * J + j]);
        }
        gain += entry(u, row, complex_numbers) * std::conj(old);
        CHECK(near(entry(P, row * J + j, complex_numbers), moved), << R << " " << J << " " << tau);
        CHECK(near(entry(without, row * J + j, complex_numbers), moved));
      }
      CHECK(near(entry(g, r * J + j, complex_numbers), gain), << R << " " << J << " " << tau);
      CHECK(near(entry(loss, r * J + j, complex_numbers), gain));
    }
  }
}

template <typename T>
void all() {
  for (const int64_t R : {1, 5, 37}) {
    for (const int64_t J : {1, 2, 31, 64}) {
      for (const int64_t tau : {0, 1, 2, 7}) {
        for (const bool complex_numbers : {false, true}) diagonal<T>(R, J, tau, complex_numbers);
      }
    }
  }
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
