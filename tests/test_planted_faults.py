"""The list of planted faults fits the library and the tests as they are; ``make faults`` plants them."""

from collections import Counter

import pytest
from planted_faults import ENGINE, FAULTS, ROOT, Fault, judged, main, places, run_pytest


def test_the_text_of_every_fault_occurs_once():
    assert len(FAULTS) >= 30 and 3 * len(ENGINE) >= len(FAULTS)
    assert [name for name, times in Counter(fault.name for fault in FAULTS).items() if times > 1] == []
    assert {fault.name: times for fault in FAULTS if (times := len(places(fault, ROOT))) != 1} == {}
    assert [fault.name for fault in FAULTS if fault.old == fault.new] == []


def test_the_tests_of_every_fault_exist():
    chosen = sorted({test for fault in FAULTS for test in fault.tests})
    status, output = run_pytest(ROOT, "--collect-only", *chosen)
    assert status == 0, output


@pytest.mark.parametrize(
    ("old", "new", "verdict", "detail"),
    [
        ("a + b", "a - b", "caught", "tests/test_small.py::test_add: "),
        ("a + b", "b + a", "survived", "in sparse_rtrl/small.py"),
        ("a + b", "a + c", "invalid", "NameError"),
        ("a + b", "a + (", "invalid", "status 2"),
        ("a * b", "b * a", "invalid", "nowhere"),
        ("def", "DEF", "invalid", "sparse_rtrl/small.py, sparse_rtrl/small.py"),
    ],
)
def test_verdicts(tmp_path, old, new, verdict, detail):
    library, tests = tmp_path / "sparse_rtrl", tmp_path / "tests"
    library.mkdir()
    tests.mkdir()
    (library / "__init__.py").touch()
    (library / "small.py").write_text("def add(a, b):\n    return a + b\n\n\ndef same(a):\n    return a\n")
    (tests / "test_small.py").write_text(
        "from sparse_rtrl.small import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    )
    found, why = judged(Fault("small", "a small one", old, new, ("tests/test_small.py",)), tmp_path)
    assert found == verdict and detail in why


def test_the_draw_is_that_of_its_seed(capsys):
    def drawn(seed):
        assert main(["--list", "--sample", "5", "--seed", seed]) == 0
        return capsys.readouterr().out

    assert drawn("1") == drawn("1") != drawn("2")
    assert len(drawn("1").splitlines()) == 5
