// Slot sets of products.
#include <random>
#include <set>
#include <vector>

#include "check.h"
#include "rings.h"

int main() {
  std::mt19937 generator(0);
  for (int trial = 0; trial < 2000; ++trial) {
    const int64_t num_slots = 1 + generator() % 9;
    std::vector<int64_t> sets[2];
    std::set<int64_t> together;
    for (std::vector<int64_t>& set : sets) {
      std::set<int64_t> distinct;
      const size_t tries = generator() % (num_slots + 1);
      for (size_t i = 0; i < tries; ++i) distinct.insert(generator() % num_slots);
      set.assign(distinct.begin(), distinct.end());
      if (!set.empty() && generator() % 2) set.push_back(set.back());  // a repeated largest slot
      together.insert(distinct.begin(), distinct.end());
    }
    const int64_t k1 = sets[0].size(), k2 = sets[1].size();
    const int64_t size = sparse_rtrl::union_size(k1, k2, num_slots);
    CHECK(size <= num_slots && size >= static_cast<int64_t>(together.size()));
    std::vector<int64_t> out(size, -7);
    const int64_t n = sparse_rtrl::union_slots(sets[0].data(), k1, sets[1].data(), k2, out.data(), size);
    CHECK(n == static_cast<int64_t>(together.size()));
    CHECK(std::vector<int64_t>(out.begin(), out.begin() + n) == std::vector<int64_t>(together.begin(), together.end()));
    for (int64_t i = n; i < size; ++i) CHECK(out[i] == out[n - 1]);
    CHECK(sparse_rtrl::num_distinct(out.data(), size) == n);
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      const int64_t at = sparse_rtrl::find_slot(out.data(), size, slot);
      CHECK((at >= 0) == (together.count(slot) > 0));
      if (at >= 0) CHECK(out[at] == slot && (at == 0 || out[at - 1] != slot));
    }
    if (n > 1) {  // too little room: counted, not written
      std::vector<int64_t> small(2, -7);
      CHECK(sparse_rtrl::union_slots(sets[0].data(), k1, sets[1].data(), k2, small.data(), 1) == n && small[1] == -7);
    }
  }
  return 0;
}
