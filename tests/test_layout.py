"""The order of the packages: each imports only those that stand before it, and nothing imports in a circle."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import sparse_rtrl
from sparse_rtrl._moved import MOVED

PACKAGE = Path(sparse_rtrl.__file__).parent
FLOORS = ("errors", "ops", "cells", "captured", "capture", "influence", "learners", "training", "cli")
KERNELS = "triton_kernels"


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("sparse_rtrl", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        yield name, path


def imports(path, known):
    """Modules of the package that a file imports, at its top or inside functions; those for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "sparse_rtrl"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparse_rtrl":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known or alias.name in (KERNELS, "_planner") else node.module)
    return found


def graph():
    paths = dict(modules())
    return {name: imports(path, paths) & set(paths) for name, path in paths.items()}


def floor(name):
    part = name.split(".")[1] if "." in name else ""
    return FLOORS.index(part) if part in FLOORS else None


def test_every_module_has_a_floor():
    others = ("sparse_rtrl", "sparse_rtrl._moved")
    assert [name for name in graph() if floor(name) is None and name not in others and KERNELS not in name] == []


def test_no_import_runs_back_up():
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        if name not in ("sparse_rtrl", "sparse_rtrl._moved") and KERNELS not in name
        for other in others
        if other == "sparse_rtrl" or (KERNELS not in other and floor(other) > floor(name))
    ]
    assert wrong == []


def test_no_circles():
    waiting = {name: others - {name} for name, others in graph().items()}
    while free := [name for name, others in waiting.items() if not others & set(waiting)]:
        for name in free:
            del waiting[name]
    assert waiting == {}


CONTRACTS = {f"sparse_rtrl.cells.{name}" for name in ("slot_cell", "diagonal_cell", "expert_bank", "fused_pass")}


def test_no_engine_knows_a_cell_by_name():
    between = range(FLOORS.index("captured"), FLOORS.index("learners") + 1)
    known = {
        name: sorted(o for o in others if o.startswith("sparse_rtrl.cells.") and o not in CONTRACTS)
        for name, others in graph().items()
        if floor(name) in between
    }
    assert {name: cells for name, cells in known.items() if cells} == {}


def test_influence_knows_what_is_captured_by_its_protocol_alone():
    capture = {name for name in graph()["sparse_rtrl.influence.sparse"] if name.startswith("sparse_rtrl.capture.")}
    assert capture == {"sparse_rtrl.capture.parameters"}


def test_kernels_know_the_errors_only():
    others = {o for name, found in graph().items() if KERNELS in name for o in found if KERNELS not in o}
    assert others <= {"sparse_rtrl.errors", "sparse_rtrl.ops.precision"}


def test_the_package_shows_its_public_names_only():
    assert sorted(name for name in dir(sparse_rtrl) if not name.startswith("_")) == sorted(sparse_rtrl.__all__)


def test_the_order_is_the_one_that_contributors_read():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    assert ", ".join(FLOORS) in text


def test_tests_mirror_the_packages():
    tests = Path(__file__).parent
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")} - {
        ".",
        "ecosystem",
        "fuzz",
    }
    assert folders == {name for name in FLOORS if (PACKAGE / name).is_dir()}


def test_old_import_paths_work_for_one_release():
    code = (
        "import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        "import sparse_rtrl\n"
        "warnings.simplefilter('always', DeprecationWarning)\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    from sparse_rtrl.slot_cell import SlotCell\n"
        "    from sparse_rtrl.methods.exact import Exact\n"
        "    import sparse_rtrl.checkpoint\n"
        "    from sparse_rtrl.ops import select\n"
        "    from sparse_rtrl.influence import Influence\n"
        "assert SlotCell is sparse_rtrl.SlotCell\n"
        "assert sparse_rtrl.checkpoint.__name__ == 'sparse_rtrl.training.checkpoint'\n"
        "assert 'sparse_rtrl.cells.slot_cell now' in str(told[0].message), [str(t.message) for t in told]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_moved_module_is_there():
    for new in MOVED.values():
        assert importlib.util.find_spec(f"sparse_rtrl.{new}") is not None, new
