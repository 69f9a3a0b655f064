"""Build of the compiled parts, all optional; the metadata stands in pyproject.toml.

CPU operations need a C++ compiler and torch at build time, the planner needs pybind11. Build with
``pip install --no-build-isolation .`` so that both are seen. SPARSE_RTRL_CPP=1 makes their absence an error, 0 leaves
them out.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
TORCH_TARGET_VERSION = "0x020b000000000000ULL"  # 2.11, the oldest version that is supported


def sources(*libraries: str) -> list[str]:
    """Sources of some libraries, from the list that CMake reads too."""
    lines = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines()]
    return [line[1] for line in lines if line and line[0] in libraries]


def headers() -> list[str]:
    """Files that the sources include."""
    return [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inc", ".cuh")]


def extensions() -> list[Extension]:
    """What can be built here; a notice for what cannot."""
    wanted = os.environ.get("SPARSE_RTRL_CPP", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"SPARSE_RTRL_CPP must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0" or (wanted == "auto" and sys.platform not in ("linux", "darwin")):
        return []
    out = []
    missing = []
    torch_spec = importlib.util.find_spec("torch")
    if torch_spec is None or torch_spec.origin is None:
        missing.append("torch (build with --no-build-isolation in an environment that has it)")
    else:
        torch_dir = Path(torch_spec.origin).parent
        out.append(
            Extension(
                "sparse_rtrl._cpu",
                sources("cpu", "operations"),
                depends=headers(),
                include_dirs=[str(torch_dir / "include")],
                library_dirs=[str(torch_dir / "lib")],
                libraries=["torch_cpu"],
                define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
                extra_compile_args=FLAGS,
                optional=wanted == "auto",
                language="c++",
            )
        )
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    else:
        import pybind11

        out.append(
            Extension(
                "sparse_rtrl._planner",
                sources("planner"),
                depends=headers(),
                include_dirs=[pybind11.get_include()],
                extra_compile_args=FLAGS,
                optional=wanted == "auto",
                language="c++",
            )
        )
    if missing and wanted == "1":
        raise SystemExit(f"SPARSE_RTRL_CPP=1, but the compiled parts need {' and '.join(missing)}")
    for name in missing:
        print(f"sparse_rtrl: built without a compiled part, which needs {name}", file=sys.stderr)
    return out


setup(ext_modules=extensions())
