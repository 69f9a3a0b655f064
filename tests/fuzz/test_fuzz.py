"""A few hundred random cases of every family, and that the comparison can fail. ``make fuzz`` runs thousands."""

from collections import Counter

import pytest
import torch

from . import carry_family, diagonal_family, optimizer_family, slot_family
from .case import EXACT, Way, judge, worst
from .draw import Draw
from .run import FAMILIES, NEEDED, REFUSED_AT_MOST, family_of, refused_share, run_case, table

CASES = 300


def test_random_cases_are_exact_or_refused():
    """One test, so that the cases run once however the tests are spread over processes."""
    outcomes = [run_case(seed) for seed in range(CASES)]
    assert all(sum(o.family == family for o in outcomes) > CASES // 20 for family in FAMILIES)
    failed = [outcome for outcome in outcomes if outcome.failed]
    assert not failed, f"\n{table(failed)}"
    refused, ordinary = refused_share(outcomes)
    assert refused <= REFUSED_AT_MOST * ordinary, f"\n{table(outcomes)}"
    counts = Counter()
    for outcome in outcomes:
        counts.update(outcome.exercised)
    assert not [name for name in NEEDED if not counts[name]]


@pytest.mark.filterwarnings("ignore:.*dense one is computed instead")
@pytest.mark.parametrize("family", [slot_family, diagonal_family, carry_family, optimizer_family])
def test_the_comparison_can_fail(family):
    """A gradient that is cut at every segment is far from the whole one in most cases."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        far = compared = 0
        for seed in range(30):
            torch.manual_seed(seed)
            case = family.make(Draw(seed))
            try:
                case.learn(Counter())  # some references replay what it recorded
            except Exception:  # judged elsewhere
                continue
            torch.manual_seed(seed)
            whole = case.reference(Way())
            torch.manual_seed(seed)
            cut = case.reference(Way(truncate=True))
            error, _ = worst(cut, whole)
            compared += 1
            far += error > 1e-2
        assert compared > 15 and far > 0.6 * compared, (far, compared)
    finally:
        torch.set_default_dtype(default)


def test_a_wrong_gradient_and_a_foreign_error_are_failures():
    seed = next(seed for seed in range(1000) if family_of(seed) == "slot" and run_case(seed).verdict == "exact")

    def spoilt(change):
        def make():
            case = slot_family.make(Draw(seed))
            learn = case.learn
            case.learn = lambda counts: change(learn(counts))
            return case

        return judge(seed, "slot", make)

    def slip(found):
        return found[None]

    def larger(found):
        return {name: g * (1 + 10 * EXACT) for name, g in found.items()}

    assert spoilt(lambda found: found).verdict == "exact"
    assert spoilt(larger).verdict == "wrong"
    assert spoilt(slip).verdict == "crash"
