"""Recurrent modules of other packages: exact, or refused by name. `make test-ecosystem` installs them."""

import importlib
import importlib.metadata
import re
import warnings

import pytest
import torch
from comparison import compare
from modules import CASES, Case
from table import Row


def installed(case: Case) -> str:
    """Version of the package; skips where it cannot be imported."""
    try:
        version = importlib.metadata.version(case.package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(case.imported)
    except Exception as error:  # packages that compile something on import raise what they like
        pytest.skip(f"{case.package} is not usable here, make test-ecosystem installs it: {error!r:.200}")
    return version


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_gradient_is_exact_or_refused_by_name(case, rows):
    row = rows[case.title] = Row(case)
    try:
        row.version = installed(case)
    except pytest.skip.Exception as reason:
        row.absent = str(reason)
        raise
    torch.manual_seed(0)
    with case.around():
        recurrence = case.build()
        found = row.outcome = compare(recurrence, case.dtype, case.arithmetic, case.lengths)
    row.batch_dim = recurrence.batch_dim
    assert found.verdict in case.expected, f"{found.verdict}: errors {found.errors}. {found.message}"
    assert found.truncated > 1e-2, "the past does not matter, so that the comparison shows nothing"
    if found.verdict == "exact":
        assert sorted(found.errors) == sorted(case.lengths)
    else:
        assert re.search(case.refusal, found.message)
