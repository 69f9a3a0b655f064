// Decisions of the planner where the answer is known.
#include "check.h"
#include "planner.h"

using sparse_rtrl::Plan;
using sparse_rtrl::Planner;
using sparse_rtrl::PlannerInput;

int main() {
  PlannerInput in;
  in.num_slots = 4;
  in.slot_size = 32;
  in.read_slots = in.write_slots = 2;
  in.num_experts = 256;
  in.top_k = 2;
  in.expert_columns = 1056;
  in.flush_every = 64;
  Plan plan = Planner(in).plan();
  CHECK(!plan.eager && plan.product_from > 0 && plan.levels > 0 && plan.buffer >= 64, << plan.buffer);
  CHECK(plan.table.size() == 4 && plan.table[0].path == "eager");
  in.buffer = 16;
  CHECK(Planner(in).plan().buffer == 16);
  in.buffer = 0;
  in.num_experts = 2;  // every expert is always active: nothing sleeps
  CHECK(Planner(in).plan().eager);
  in.num_experts = 0;
  CHECK(Planner(in).plan().eager);
  // Products of 64 slots fill in to 4096 blocks and replay saves no operations, so eager it is.
  in.num_experts = 64;
  in.num_slots = 64;
  plan = Planner(in).plan();
  CHECK(plan.eager || plan.product_from == 0, << plan.product_from);
  // A gap of one is never worth a product, and a product gets better with the gap.
  in.num_slots = 4;
  const Planner planner(in);
  CHECK(planner.product_seconds(1.0, 6) >= planner.replay_seconds(1.0));
  CHECK(planner.product_seconds(64.0, 6) < planner.replay_seconds(64.0));
  CHECK(planner.tree_bytes(64, 2) > planner.tree_bytes(64, 1));
  in.slot_size = 0;
  bool refused = false;
  try {
    Planner{in};
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()) == "slot_size must be at least 1, got 0";
  }
  CHECK(refused);
  return 0;
}
