"""Build the packages as users get them, install them where there is no compiler, and run the README and the docs.

    python tools/test_packages.py

Needs a package index, and an environment with torch, pybind11, setuptools and a compiler, whose Python runs this. Three
builds, all of a copy of the tracked files: a source distribution and a wheel in isolation, and from the source
distribution a wheel with the compiled parts. Both wheels are then installed in turn into a new environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 1_500_000
"""Of a wheel: one with debug information is far larger."""
STAND_IN = "the compiled operations for cpu are missing"
CHECK = """
import shutil, sys, warnings
import sparse_rtrl
from sparse_rtrl.ops import dispatch
from sparse_rtrl.influence import plan
assert sparse_rtrl.__file__.startswith(sys.prefix), sparse_rtrl.__file__
found = [tool for tool in ("cc", "c++", "gcc", "g++", "clang", "clang++") if shutil.which(tool)]
assert not found, f"this environment was to have no compiler, and has {found}"
print(f"sparse_rtrl {sparse_rtrl.__version__}, compiled operations: {dispatch.compiled_problem or 'there'},"
      f" planner: {plan.planner.__name__}")
"""


def say(text: str, start: float) -> None:
    """Print what was done, and how long it took."""
    print(f"test-packages: {text} ({time.perf_counter() - start:.0f} s)", flush=True)


def call(*command: str | Path, **options: object) -> str:
    """Run a command; returns what it printed, and ends with all of it if it fails."""
    done = subprocess.run([str(c) for c in command], stdout=-1, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def copy_sources(folder: Path) -> None:
    """Copy the tracked files, so that nothing else can get into a package."""
    for name in call("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name and os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def check_wheel(wheel: Path, compiled: bool) -> None:
    """Check size and contents of a wheel."""
    names = zipfile.ZipFile(wheel).namelist()
    libraries = [name for name in names if name.endswith(".so")]
    assert ("sparse_rtrl/_cpu.so" in libraries) == compiled, libraries
    assert compiled or wheel.name.endswith("-py3-none-any.whl"), wheel.name
    assert "sparse_rtrl/triton_kernels/launch.py" in names and "sparse_rtrl/py.typed" in names
    assert wheel.stat().st_size < MOST_BYTES, f"{wheel.name} has {wheel.stat().st_size} bytes"
    print(f"  {wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB, libraries: {', '.join(libraries) or 'none'}")


def check_installed(python: Path, folder: Path, compiled: bool) -> None:
    """Run README and docs with what is installed, without a compiler; the stand-in is told of once, or never."""
    alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}
    alone["PATH"] = str(python.parent)
    options = {"cwd": folder, "env": alone}
    print("  " + call(python, "-c", CHECK, **options).strip())
    pages = ["README.md", *sorted(str(p.relative_to(folder)) for p in (folder / "docs").rglob("*.md"))]
    printed = call(python, folder / "run_docs.py", *pages, **options)
    assert printed.count(STAND_IN) == (0 if compiled else 1), printed
    print(f"  {printed.strip().splitlines()[-1]}; {'no warning' if compiled else 'one warning'}")


def main() -> int:
    """Build, install and run; 0 if all went well."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        sources, dist, pages = Path(root) / "sources", Path(root) / "dist", Path(root) / "pages"
        copy_sources(sources)
        environment = Path(root) / "environment"
        venv.create(environment, with_pip=True, symlinks=True)
        python = environment / "bin/python"
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
        call(*pip, "build")
        call(python, "-m", "build", "--outdir", dist, sources)
        (archive,), (plain,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
        print(f"  {archive.name}: {archive.stat().st_size / 1e3:.0f} kB")
        check_wheel(plain, compiled=False)
        say("built in isolation", start)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
        must = {**os.environ, "SPARSE_RTRL_CPP": "1", "SPARSE_RTRL_CUDA": "0"}
        call(sys.executable, "-m", "pip", "wheel", *options, "-w", dist / "compiled", archive, env=must)
        (compiled,) = (dist / "compiled").iterdir()
        check_wheel(compiled, compiled=True)
        say("built with the compiled parts", start)
        pages.mkdir()
        shutil.copy2(ROOT / "tools/run_docs.py", pages)
        shutil.copy2(ROOT / "README.md", pages)
        shutil.copytree(ROOT / "docs", pages / "docs")
        # torch by itself first: pip then takes the build for the CPU where the index has one.
        call(*pip, "torch")
        call(*pip, plain)
        say("installed into a new environment", start)
        check_installed(python, pages, compiled=False)
        say("ran without compiled parts", start)
        call(*pip, "--force-reinstall", "--no-deps", compiled)
        check_installed(python, pages, compiled=True)
        say("ran with compiled parts", start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
