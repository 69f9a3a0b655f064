// Which nodes an append completes and which answer a suffix, against brute force.
#include <algorithm>
#include <utility>
#include <vector>

#include "check.h"
#include "dyadic.h"

using sparse_rtrl::completed_levels;
using sparse_rtrl::covering_node;
using sparse_rtrl::highest_level;
using sparse_rtrl::NodeId;

int main() {
  CHECK(highest_level(1) == 0 && highest_level(7) == 2 && highest_level(8) == 3);
  for (const int64_t capacity : {1, 2, 5, 8, 13, 64}) {
    for (const int64_t first : {0, 3}) {
      for (int levels = 0; levels <= highest_level(capacity); ++levels) {
        // What each ring slot holds, by the number of the node.
        std::vector<std::vector<int64_t>> rings;
        for (int level = 0; level <= levels; ++level) rings.emplace_back(capacity >> level, -1);
        int64_t merges = 0;
        for (int64_t count = first + 1; count < first + 4 * capacity + 5; ++count) {
          rings[0][(count - 1) % capacity] = count - 1;
          const int completed = completed_levels(count, first, levels);
          for (int level = 1; level <= completed; ++level) {
            const int64_t index = (count >> level) - 1;
            CHECK((index << level) >= first && ((index + 1) << level) == count);
            for (const int64_t child : {2 * index, 2 * index + 1}) {
              CHECK(rings[level - 1][child % (capacity >> (level - 1))] == child);
            }
            rings[level][index % (capacity >> level)] = index;
            ++merges;
          }
          CHECK(merges <= count - first);
          for (int64_t start = std::max(first, count - capacity); start <= count; ++start) {
            int64_t position = start, size = 0;
            for (; position < count; ++size) {
              const NodeId node = covering_node(position, count, levels);
              CHECK(node.index << node.level == position);
              CHECK(rings[node.level][node.index % (capacity >> node.level)] == node.index, << "stale node");
              position += int64_t{1} << node.level;
            }
            CHECK(position == count);
            if (levels == highest_level(capacity)) CHECK(size <= 2 * levels + 2, << size);
          }
        }
      }
    }
  }
  return 0;
}
