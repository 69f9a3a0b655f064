"""What the packages hold and how they are named; tools/test_packages.py installs and runs them."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

import sparse_rtrl
from sparse_rtrl import RTRL, SlotMoECell, ops

ROOT = Path(__file__).parents[1]


def load_set_up():
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Files of a source distribution, made without the network and beside the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    for path in ROOT.iterdir():
        if path.name in ("sparse_rtrl", "triton_kernels", "csrc") or path.suffix in (".py", ".toml", ".in", ".md"):
            (folder / path.name).symlink_to(path)
    (folder / "LICENSE").symlink_to(ROOT / "LICENSE")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder / "dist")]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "SPARSE_RTRL_CPP": "0"}
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (folder / "dist").iterdir()
    with tarfile.open(archive) as opened:
        assert all(member.isfile() or member.isdir() for member in opened), "a link may point nowhere once unpacked"
        return {member.name.split("/", 1)[1] for member in opened if member.isfile()}


def test_a_source_distribution_holds_all_sources(names):
    """Though torch, of which the build makes its list of extensions depend, was not looked for."""
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    package = {p for suffix in ("py", "jinja", "typed") for p in (ROOT / "sparse_rtrl").rglob(f"*.{suffix}")}
    wanted |= {str(p.relative_to(ROOT)) for p in package}
    wanted |= {f"sparse_rtrl/triton_kernels/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")}
    assert len(wanted) > 60 and wanted <= names, wanted - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_versions_agree():
    metadata = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{sparse_rtrl.__version__}"' in metadata
    assert f"version: {sparse_rtrl.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{sparse_rtrl.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_names_say_what_a_build_is_for(tmp_path):
    """One library of operations for every Python; a wheel is of one Python only for the planner's sake."""
    set_up = load_set_up()
    operations = set_up.Operations("sparse_rtrl._cpu", [])
    planner = set_up.Extension("sparse_rtrl._planner", [])
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for built, tags in (
        ([operations, planner], {python}),
        ([operations], {"py3", "none"}),
        ([], {"py3", "none", "any"}),
    ):
        distribution = set_up.setup(
            ext_modules=built,
            cmdclass={"build_ext": set_up.BuildExtensions, "bdist_wheel": set_up.BuildWheel},
            script_args=["--version"],
            name="any",
        )
        wheel = distribution.get_command_obj("bdist_wheel")
        wheel.ensure_finalized()
        assert tags <= set(wheel.get_tag())
        assert ("any" in wheel.get_tag()) == (not built)
    command = set_up.BuildExtensions(
        set_up.setup(ext_modules=[operations, planner], script_args=["--version"], name="any")
    )
    command.finalize_options()
    assert command.get_ext_filename("sparse_rtrl._cpu") == os.path.join("sparse_rtrl", "_cpu.so")
    assert python[2:] in command.get_ext_filename("sparse_rtrl._planner")


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
def test_a_build_keeps_the_order_of_sources_and_only_what_was_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.cpp").write_text("__attribute__((weak)) int chosen() { return 2; }\n")
    (tmp_path / "a.cpp").write_text("__attribute__((weak)) int chosen() { return 1; }\n")
    (tmp_path / "broken.cpp").write_text("int f() { return }\n")
    set_up = load_set_up()
    flags = {"extra_compile_args": set_up.FLAGS[:-4], "extra_link_args": set_up.LINK_FLAGS, "language": "c++"}
    good = set_up.Operations("_good", ["b.cpp", "a.cpp"], **flags)
    broken = set_up.Operations("_broken", ["broken.cpp"], optional=True, **flags)
    (tmp_path / "lib").mkdir()
    for name in ("_broken.so", "_older.so"):
        (tmp_path / "lib" / name).write_text("left by an earlier build")
        os.utime(tmp_path / "lib" / name, (0, 0))
    commands = {"build_ext": set_up.BuildExtensions}
    distribution = set_up.setup(ext_modules=[good, broken], cmdclass=commands, script_args=["--version"], name="any")
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = "lib", "temp"
    command.ensure_finalized()
    command.run()
    assert distribution.ext_modules == [good]
    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["_good.so"]
    # The linker keeps the first of two weak symbols.
    assert ctypes.CDLL(str(tmp_path / "lib" / "_good.so"))._Z6chosenv() == 2
    before = (tmp_path / "lib" / "_good.so").stat().st_mtime_ns
    good.sources, good.extra_objects = ["b.cpp", "a.cpp"], []
    distribution.reinitialize_command(command).build_lib = "lib"
    command.ensure_finalized()
    command.run()
    assert (tmp_path / "lib" / "_good.so").stat().st_mtime_ns == before, "nothing had changed"


def test_libraries_hold_no_debug_information():
    for library in (ROOT / "sparse_rtrl").glob("_*.so"):
        assert b".debug_info" not in library.read_bytes()[-65536:], f"{library} was built with -g"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_reference_stands_in_with_one_warning(monkeypatch, kind):
    monkeypatch.setattr(ops, "_told", set())
    monkeypatch.setattr(ops, "compiled_problem", "they were not built")
    monkeypatch.setattr(ops, "cuda_problem", "they were not built")
    device, variable = torch.device(kind), {"cpu": "SPARSE_RTRL_CPP", "cuda": "SPARSE_RTRL_CUDA"}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.select("reference", device, torch.float32)
        ops.select("auto", device, torch.bfloat16)
        ops.select("auto", torch.device("meta"), torch.float32)
    with pytest.warns(UserWarning, match=rf"{variable}=1 pip install --no-build-isolation \.") as told:
        ops.select("auto", device, torch.float32)
        ops.select("auto", device, torch.float64)
    assert len(told) == 1


def test_a_learner_tells_that_the_reference_stands_in(monkeypatch):
    monkeypatch.setattr(ops, "_told", set())
    monkeypatch.setattr(ops, "compiled_problem", "they were not built")
    cell = SlotMoECell(4, 4, 2, 2, 1, read_slots=1, write_slots=1, output_size=2)
    with pytest.warns(UserWarning, match=r"operations for cpu are missing \(they were not built\)"):
        RTRL(cell, batch_size=1)
