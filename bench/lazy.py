"""Time per token of the influence work with the planner, over that of eager updating, in one run.

``python bench/lazy.py --out bench/results/lazy_cpu.json`` for the whole table; ``--slots 4 --experts 64 256`` for a
part of it. Both get the same captured steps of a cell, in alternating rounds of at least a second and 64 tokens,
flushes included; every round draws its steps anew from a pool of 256. Rounds are repeated until the quartiles of the
ratio lie within 5 % of its median, or ``--rounds`` are used up. Before anything is timed, the gradients of both over
the first tokens are compared. Capture time stands beside the influence time.
"""

import argparse
import json
import math
import statistics
import time

import torch
from influence_update import machine

from sparse_rtrl import Routing, SlotMoECell
from sparse_rtrl.influence.sparse import Influence
from sparse_rtrl.learners.engine import Engine
from sparse_rtrl.ops.reference import slot_entries

BLOCK = 64
POOL = 256


class Experiment:
    """One configuration: a cell, a stream of routings, and an influence for each way to catch up."""

    def __init__(
        self, slots: int, experts: int, routing: str, flush_every: int, batch: int, commit_every: int, core: bool
    ) -> None:
        torch.manual_seed(0)
        self.cell = SlotMoECell(
            input_size=32,
            slot_size=32,
            num_slots=slots,
            num_experts=experts,
            top_k=2,
            read_slots=2,
            write_slots=2,
            output_size=4,
        )
        if not core:  # influence of the experts alone; the router's part of the core grows with their number
            for name, parameter in self.cell.named_parameters():
                parameter.requires_grad_(name.startswith("experts."))
        self.engine = Engine(self.cell, batch, 1, "eager")
        self.influences = {"eager": self.engine.influence, "auto": self.new_influence("auto", batch)}
        for influence in self.influences.values():
            influence.commit_every = commit_every
        weights = torch.ones(experts) if routing == "uniform" else 1.0 / torch.arange(1, experts + 1)
        self.weights = weights.expand(batch, -1)
        self.generator = torch.Generator().manual_seed(1)
        self.slots, self.batch, self.flush_every, self.commit_every = slots, batch, flush_every, commit_every
        self.tokens = dict.fromkeys(self.influences, 0)
        self.capture_seconds: list[float] = []
        self.state = torch.randn(batch, slots, 32, generator=self.generator)

    def new_influence(self, catch_up: str, batch: int) -> Influence:
        cell = self.cell
        return Influence(
            self.engine.groups,
            batch,
            cell.num_slots,
            cell.slot_size,
            "auto",
            catch_up,
            torch.float32,
            self.engine.device,
        )

    def capture(self, count: int) -> list:
        """Steps of ``count`` tokens and a loss gradient for each."""
        out = []
        for _ in range(count):
            pick = [torch.rand(self.batch, self.slots, generator=self.generator).argsort(1)[:, :2] for _ in range(2)]
            experts = torch.multinomial(self.weights, 2, generator=self.generator)
            x = torch.randn(self.batch, 32, generator=self.generator)
            tensors = self.engine.checked_tensors()
            start = time.perf_counter()
            step = self.engine.step(x, self.state, Routing(*pick, experts), tensors, 0)
            self.capture_seconds.append(time.perf_counter() - start)
            # A loss on the output of a step depends on its support alone.
            support = slot_entries(step.routing.support, self.cell.slot_size)
            u = torch.zeros(self.batch, self.cell.hidden_size)
            u.scatter_(1, support, torch.randn(support.shape, generator=self.generator) / 10)
            out.append((step, u))
        return out

    def draw(self, pool: list, count: int) -> list:
        """Some steps of a pool, in random order."""
        return [pool[i] for i in torch.randint(len(pool), (count,), generator=self.generator).tolist()]

    def run(self, name: str, steps: list) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Seconds of the influence work of some tokens, and the gradients that were handed out."""
        influence = self.influences[name]
        total = [torch.zeros(self.engine.groups.core_columns), torch.zeros(*self.weights.shape[1:], 0)]
        total[1] = torch.zeros(self.weights.shape[1], self.engine.groups.expert_columns)
        seconds = 0.0
        for step, u in steps:
            start = time.perf_counter()
            if len(influence.window) >= self.commit_every:
                influence.commit()
            influence.record([step])
            handed = [influence.loss_gradient(len(influence.window) - 1, u, 0)]
            self.tokens[name] += 1
            if self.tokens[name] % self.flush_every == 0:
                handed.append(influence.flush())
            seconds += time.perf_counter() - start
            for core, experts in handed:
                total[0] += core
                total[1] += experts
        return seconds, total[0], total[1]


def measure(slots: int, experts: int, routing: str, flush_every: int, options: argparse.Namespace) -> dict:
    experiment = Experiment(slots, experts, routing, flush_every, options.batch, options.commit_every, options.core)
    steps = experiment.capture(BLOCK)
    _, *expected = experiment.run("eager", steps)
    _, *found = experiment.run("auto", steps)
    if experiment.tokens["auto"] % flush_every:
        raise ValueError(f"flush_every must divide {BLOCK}, got {flush_every}")
    error = max(float((f - e).norm() / e.norm().clamp_min(1e-30)) for e, f in zip(expected, found, strict=True))
    assert error < 1e-4, error
    auto = experiment.influences["auto"]
    sleep = experts / 2  # mean, for uniform routing
    pool = steps + experiment.capture(POOL - BLOCK)
    for _ in range(min(options.warm, math.ceil(3 * sleep / BLOCK))):
        experiment.run("auto", experiment.draw(pool, BLOCK))
    per_block = min(experiment.run(name, pool[:BLOCK])[0] for name in ("eager", "auto"))
    tokens = BLOCK * math.ceil(1.0 / per_block)
    times: dict[str, list[float]] = {"eager": [], "auto": []}
    spread = 1.0
    for done in range(options.rounds):
        steps = experiment.draw(pool, tokens)
        for name in list(times)[:: 1 if done % 2 else -1]:
            times[name].append(experiment.run(name, steps)[0] / tokens)
        if done >= 4:
            ratios = [a / e for e, a in zip(*times.values(), strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            spread = max(high - middle, middle - low) / middle
            if spread <= 0.05:
                break
    eager, lazy = (statistics.median(values) for values in times.values())
    paired = statistics.median(a / e for e, a in zip(*times.values(), strict=True))
    plan = auto.plan
    return {
        "slots": slots,
        "experts": experts,
        "routing": routing,
        "step_every": flush_every,
        "batch": options.batch,
        "commit_every": options.commit_every,
        "core": options.core,
        "eager_ms": eager * 1e3,
        "planner_ms": lazy * 1e3,
        "capture_ms": statistics.median(experiment.capture_seconds) * 1e3,
        "planner_over_eager": paired,
        "quartiles_of_ratio_within": spread,
        "rounds": len(times["eager"]),
        "tokens_per_round": tokens,
        "plan": "eager" if plan.eager else f"lazy buffer {plan.buffer} levels {plan.levels} from {plan.product_from}",
        "events": dict(auto.events),
        "relative_error": error,
    }


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    slots = sorted({row["slots"] for row in rows})
    figure, axes = plt.subplots(1, len(slots), figsize=(4 * len(slots), 3.4), squeeze=False, layout="constrained")
    for ax, s in zip(axes[0], slots, strict=True):
        for step_every, style in ((1, "--"), (64, "-")):
            for name, colour in (("eager_ms", "tab:red"), ("planner_ms", "tab:blue")):
                points = [
                    (row["experts"], row[name])
                    for row in rows
                    if (row["slots"], row["step_every"], row["routing"]) == (s, step_every, "uniform")
                ]
                if points:
                    label = f"{name[:-3]}, optimizer step every {step_every}"
                    ax.plot(*zip(*sorted(points), strict=True), style, color=colour, marker="o", label=label)
        ax.set(xscale="log", yscale="log", xlabel="experts", title=f"{s} slots, uniform routing")
    axes[0, 0].set_ylabel("influence work, ms per token")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--routing", nargs="+", default=["uniform", "zipf"])
    parser.add_argument("--step-every", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--experts-only", dest="core", action="store_false", help="freeze the core group")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--commit-every", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warm", type=int, default=100, help="most blocks of warm-up")
    parser.add_argument("--out")
    parser.add_argument("--plot")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print("slots experts routing step-every   eager planner capture (ms/token)  ratio spread  plan")
    for slots in options.slots:
        for experts in options.experts:
            for routing in options.routing:
                for step_every in options.step_every:
                    row = measure(slots, experts, routing, step_every, options)
                    rows.append(row)
                    print(
                        f"{slots:5} {experts:7} {routing:>7} {step_every:10} {row['eager_ms']:7.2f}"
                        f" {row['planner_ms']:7.2f} {row['capture_ms']:7.2f}           "
                        f" {row['planner_over_eager']:6.3f} {row['quartiles_of_ratio_within']:6.3f}  {row['plan']}",
                        flush=True,
                    )
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
