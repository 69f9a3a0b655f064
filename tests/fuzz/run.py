"""Run random cases and say what came of them.

``python -m tests.fuzz.run --cases 10000`` runs the cases of the seeds 0, 1, ...; ``--case SEED`` runs one again and
prints the whole error. A seed determines its case, the family included. The exit status is 1 if any case failed, or if
more than one in a hundred of the cases that must be exact was refused.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from . import carry_family, case, diagonal_family, fault_family, optimizer_family, slot_family
from .case import Case, Outcome, judge
from .draw import Draw

FAMILIES: dict[str, tuple[int, Callable[[Draw], Case]]] = {
    "slot": (26, slot_family.make),
    "diagonal": (16, diagonal_family.make),
    "carry": (26, carry_family.make),
    "optimizer": (14, optimizer_family.make),
    "fault": (18, fault_family.make),
}
"""Families by name, with their share of the cases in percent."""

REFUSED_AT_MOST = 0.01
"""Share of the cases that must be exact which may be refused."""

NEEDED = (
    "wakes", "expiries", "replays", "products", "payments", "wraps", "commits", "dense path", "fused pass",
    "segment of 1", "segment of 2", "segment of 3", "segment of 4", "late losses", "resets in mid-window",
    "resets of some streams", "resets of all streams", "loss of the entry state", "parameter hooks",
    "input buffers reused", "reload: load", "reload: deepcopy", "reload: pickle", "reload: copy",
    "window of 3", "window of 5 or more", "restart: where",
    "restart: reset and where", "restart: in place", "restart: all, reset", "start: none", "start: parameter",
    "start: encoder", "update: adam fused", "update: data add", "update: data replaced", "diagonal learners",
    "diagonal carries", "slot learners", "carries", "carries with updates", "slot learners with updates",
    "taped segments",
    "diagonal learners with updates",
)  # fmt: skip
"""What a few hundred cases must have exercised."""


def family_of(seed: int) -> str:
    """The family of a seed's case."""
    place = Draw(-1 - seed).integer(0, sum(share for share, _ in FAMILIES.values()) - 1)
    for name, (share, _) in FAMILIES.items():
        place -= share
        if place < 0:
            return name
    raise AssertionError("the shares do not add up")


def run_case(seed: int) -> Outcome:
    """Run the case of a seed."""
    name = family_of(seed)
    return judge(seed, name, lambda: FAMILIES[name][1](Draw(seed)))


def seeds(first: int, count: int, family: str | None) -> Iterator[int]:
    """``count`` seeds from ``first`` on, of one family or of all."""
    seed = first
    while count:
        if family is None or family_of(seed) == family:
            yield seed
            count -= 1
        seed += 1


def run_many(chunk: list[int]) -> list[Outcome]:
    """Run several cases, for a worker process."""
    torch.set_num_threads(1)
    return [run_case(seed) for seed in chunk]


def outcomes_of(chosen: list[int], processes: int, report: Callable[[int], None]) -> list[Outcome]:
    """Run cases in several processes; a process that dies makes a crash of every case that it was running."""
    if processes == 1:
        return [outcome for seed in chosen for outcome in run_many([seed])]
    chunks = [chosen[i : i + 20] for i in range(0, len(chosen), 20)]
    out: list[Outcome] = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(run_many, chunk): chunk for chunk in chunks}
        for job in as_completed(jobs):
            try:
                out += job.result()
            except BrokenProcessPool:
                out += [Outcome(seed, family_of(seed), "?", "crash", detail="its process died") for seed in jobs[job]]
            report(len(out))
    return sorted(out, key=lambda outcome: outcome.seed)


def refused_share(outcomes: list[Outcome]) -> tuple[int, int]:
    """How many of the cases that must be exact were refused, and how many there were."""
    ordinary = [outcome for outcome in outcomes if outcome.must_be_exact]
    return sum(outcome.verdict == "refused" for outcome in ordinary), len(ordinary)


def table(outcomes: list[Outcome]) -> str:
    """What came of the cases, for reading."""
    lines = [
        f"{'family':<12}{'cases':>7}{'exact':>7}{'refused':>9}{'wrong':>7}{'crash':>7}{'worst error':>13}"
        f"{'share of limit':>16}{'ms':>6}"
    ]
    for name in [*FAMILIES, "all"]:
        own = [outcome for outcome in outcomes if name in (outcome.family, "all")]
        if not own:
            continue
        verdicts = Counter(outcome.verdict for outcome in own)
        exact = [outcome for outcome in own if outcome.verdict == "exact"]
        wide = [outcome.error for outcome in exact if "float32" not in outcome.kind]
        lines.append(
            f"{name:<12}{len(own):>7}{verdicts['exact']:>7}{verdicts['refused']:>9}{verdicts['wrong']:>7}"
            f"{verdicts['crash']:>7}{max(wide, default=0.0):>13.1e}"
            f"{max((outcome.share for outcome in exact), default=0.0):>16.2f}"
            f"{1e3 * sum(outcome.seconds for outcome in own) / len(own):>6.0f}"
        )
    refused, ordinary = refused_share(outcomes)
    lines.append(f"\nof {ordinary} cases that must be exact, {refused} were refused")
    lines.append("\nrefused, by what the error says:")
    reasons = Counter(
        ("MUST BE EXACT  " * outcome.must_be_exact, without_numbers(outcome.detail)[:90])
        for outcome in outcomes
        if outcome.verdict == "refused"
    )
    lines += [f"{count:>7}  {must}{reason}" for (must, reason), count in reasons.most_common()]
    failed = defaultdict(list)
    for outcome in outcomes:
        if outcome.failed:
            failed[f"{outcome.verdict}: {outcome.family}: {kind_of(outcome)}"].append(outcome)
    if failed:
        lines.append("\nfailed; a case is run again by python -m tests.fuzz.run --case SEED:")
    for what, those in sorted(failed.items(), key=lambda item: -len(item[1])):
        numbers = ", ".join(str(outcome.seed) for outcome in those[:8])
        lines.append(f"{len(those):>7}  {what}")
        lines.append(f"         seeds {numbers}{', ...' if len(those) > 8 else ''}")
        lines.append(f"         the first: {those[0].kind}; {those[0].detail}")
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        counts.update(outcome.exercised)
    lines.append("\nexercised:")
    lines += [f"{count:>9}  {name}" for name, count in sorted(counts.items())]
    return "\n".join(lines)


def without_numbers(text: str) -> str:
    """A message without the digits that differ from case to case."""
    return "".join("#" if letter.isdigit() else letter for letter in text)


SPECIAL = (
    "start: ", "trained initial", "parameter hook", "sorted", "compacted", "complex", "assign", "frozen",
    "fused", "data ", "average", "parametrized",
)  # fmt: skip
"""Words in the description of a case that likely say why it failed, likeliest first."""


def kind_of(outcome: Outcome) -> str:
    """Failures of one kind have one name."""
    if outcome.verdict == "crash":
        return without_numbers(outcome.detail)[:120]
    if outcome.family == "fault":
        return outcome.kind
    return next((word.strip(": ") for word in SPECIAL if word in outcome.kind), outcome.kind)


def main(arguments: list[str] | None = None) -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--case", type=int, help="run this one case again")
    parser.add_argument("--out", type=Path, help="write what came of every case as JSON")
    options = parser.parse_args(arguments)
    if options.case is not None:
        described = case._described

        def loud(error: Exception) -> str:
            traceback.print_exception(error)
            return described(error)

        case._described = loud
        outcome = run_case(options.case)
        print(json.dumps(outcome.as_dict(), indent=2))
        return int(outcome.failed)
    started = time.perf_counter()

    def report(done: int) -> None:
        print(f"\r{done} of {options.cases}", end="", file=sys.stderr, flush=True)

    outcomes = outcomes_of(list(seeds(options.seed, options.cases, options.family)), options.processes, report)
    print(file=sys.stderr)
    print(table(outcomes))
    print(f"\n{len(outcomes)} cases in {time.perf_counter() - started:.0f} s")
    if options.out is not None:
        options.out.write_text(json.dumps([outcome.as_dict() for outcome in outcomes], indent=1))
    refused, ordinary = refused_share(outcomes)
    return int(any(outcome.failed for outcome in outcomes) or refused > REFUSED_AT_MOST * ordinary)


if __name__ == "__main__":
    sys.exit(main())
