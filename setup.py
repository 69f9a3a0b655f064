"""Build of the compiled parts, all optional; the metadata stands in pyproject.toml.

CPU operations need a C++ compiler and torch at build time, the planner needs pybind11. CUDA operations need a torch
that was built for CUDA, and nvcc; no device is asked for. Build with ``pip install --no-build-isolation .`` so that
they are seen. SPARSE_RTRL_CPP=1 makes the absence of the first two an error, SPARSE_RTRL_CUDA=1 that of the third; 0
leaves them out. SPARSE_RTRL_CUDA_ARCH names the GPUs to compile for, by default "80 90": machine code for each, and PTX
of the last one for newer GPUs.

Operations are libraries that torch loads: one build serves every Python, and every torch from TORCH_TARGET_VERSION on.
The planner is a module of one Python; SPARSE_RTRL_PLANNER=0 leaves it out, and the wheel then serves every Python too.
"""

import importlib.util
import os
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
# Python brings -g among flags of its own: without debug information and symbols a library has a tenth of the size.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
LINK_FLAGS = ["-Wl,-s"] if sys.platform == "linux" else []
NVCC_FLAGS = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
TORCH_TARGET_VERSION = "0x020b000000000000ULL"  # 2.11, the oldest version that is supported


class Operations(Extension):
    """A library of operations, which torch loads; it has nothing of Python in it."""


def sources(*libraries: str) -> list[str]:
    """Sources of some libraries, from the list that CMake reads too."""
    lines = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines()]
    return [line[1] for line in lines if line and line[0] in libraries]


def headers() -> list[str]:
    """Files that the sources include."""
    return [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inc", ".cuh")]


def choice(variable: str) -> str:
    """An environment variable that is 0, 1 or auto."""
    wanted = os.environ.get(variable, "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"{variable} must be 0, 1 or auto, got {wanted!r}")
    if wanted == "auto" and sys.platform not in ("linux", "darwin"):
        return "0"
    return wanted


def torch_folder() -> Path | None:
    """Where torch is installed; it is not imported."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def cpu_extensions(wanted: str) -> list[Extension]:
    """Operations for the CPU and the planner; a notice or an error for what cannot be built here."""
    out = []
    missing = []
    torch_dir = torch_folder()
    if torch_dir is None:
        missing.append("torch (build with --no-build-isolation in an environment that has it)")
    else:
        out.append(
            Operations(
                "sparse_rtrl._cpu",
                sources("cpu", "operations"),
                depends=headers(),
                include_dirs=[str(torch_dir / "include")],
                library_dirs=[str(torch_dir / "lib")],
                libraries=["torch_cpu"],
                define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
                extra_compile_args=FLAGS,
                extra_link_args=LINK_FLAGS,
                optional=wanted == "auto",
                language="c++",
            )
        )
    if choice("SPARSE_RTRL_PLANNER") != "0":
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
                    extra_link_args=LINK_FLAGS,
                    optional=wanted == "auto",
                    language="c++",
                )
            )
    if missing and wanted == "1":
        raise SystemExit(f"SPARSE_RTRL_CPP=1, but the compiled parts need {' and '.join(missing)}")
    for name in missing:
        print(f"sparse_rtrl: built without a compiled part, which needs {name}", file=sys.stderr)
    return out


def find_nvcc() -> str | None:
    """The CUDA compiler: on the PATH, or in CUDA_HOME or its usual place."""
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if folder and (found := shutil.which("nvcc", path=str(Path(folder) / "bin"))):
            return found
    return shutil.which("nvcc")


def cuda_extensions(wanted: str) -> list[Extension]:
    """Operations for CUDA, if torch was built for it and nvcc is there; with ``wanted == "1"`` anything else raises."""
    torch_dir, nvcc, missing = torch_folder(), find_nvcc(), []
    if torch_dir is None:
        missing.append("torch (build with --no-build-isolation in an environment that has it)")
    elif runpy.run_path(str(torch_dir / "version.py")).get("cuda") is None:
        missing.append(f"a torch that was built for CUDA (the one in {torch_dir} was built for the CPU)")
    if nvcc is None:
        missing.append("nvcc of the CUDA toolkit (on the PATH, or in the bin folder of CUDA_HOME)")
    if missing:
        if wanted == "1":
            raise SystemExit(f"SPARSE_RTRL_CUDA=1, but the CUDA operations need {' and '.join(missing)}")
        return []
    assert torch_dir is not None and nvcc is not None
    toolkit = Path(nvcc).resolve().parents[1]
    return [
        Operations(
            "sparse_rtrl._cuda",
            sources("cuda", "cuda_operations"),
            depends=headers(),
            include_dirs=[str(torch_dir / "include")],
            library_dirs=[str(torch_dir / "lib"), str(toolkit / "lib64"), str(toolkit / "lib")],
            # The runtime is linked statically: it must not depend on which one torch brought.
            libraries=["torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
            extra_compile_args=FLAGS,
            extra_link_args=LINK_FLAGS,
            optional=wanted == "auto",
            language="c++",
        )
    ]


def architecture_flags() -> list[str]:
    """What nvcc compiles for."""
    names = os.environ.get("SPARSE_RTRL_CUDA_ARCH", "80 90").split()
    if not names or not all(name.rstrip("af").isdigit() for name in names):
        raise SystemExit(f"SPARSE_RTRL_CUDA_ARCH must be a list such as '80 90', got {' '.join(names)!r}")
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


class BuildExtensions(build_ext):
    """Compiles all sources at once, ``.cu`` files with nvcc, and keeps of the extensions what was built."""

    def build_extensions(self) -> None:
        """Build all extensions; those that are optional may be missing afterwards."""
        self.parallel = True  # one thread for each extension, and the pool for its sources
        self.built: list[Extension] = []
        with ThreadPoolExecutor(os.cpu_count()) as self.pool:
            super().build_extensions()
        self.extensions = self.distribution.ext_modules = [e for e in self.extensions if e in self.built]
        # What an earlier build left would go into the wheel.
        current = {Path(self.get_ext_fullpath(extension.name)) for extension in self.built}
        for path in set(Path(self.build_lib).rglob("*.so")) - current:
            path.unlink()

    def build_extension(self, ext: Extension) -> None:
        """Build one extension. Its objects keep the order of its sources, which setuptools sorts by name."""
        depends = [*ext.sources, *ext.depends]
        if self.force or newer_group(depends, self.get_ext_fullpath(ext.name), "newer"):
            ext.extra_objects = [*self.pool.map(lambda source: self.compile(ext, source), ext.sources)]
            ext.sources, ext.depends = [], depends
        super().build_extension(ext)
        self.built.append(ext)

    def compile(self, ext: Extension, source: str) -> str:
        """Compile one source; returns its object file."""
        if source.endswith(".cu"):
            nvcc = find_nvcc()
            assert nvcc is not None
            target = Path(self.build_temp) / f"{source}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([nvcc, *NVCC_FLAGS, *architecture_flags(), "-c", source, "-o", str(target)])
            return str(target)
        options = {"include_dirs": ext.include_dirs, "extra_postargs": ext.extra_compile_args, "debug": self.debug}
        (target,) = self.compiler.compile([source], self.build_temp, ext.define_macros, **options)
        return target

    def get_ext_filename(self, fullname: str) -> str:
        """Name of a built file: without a tag of this Python where it serves every one."""
        if isinstance(self.ext_map.get(fullname), Operations):
            return f"{os.path.join(*fullname.split('.'))}.so"
        return super().get_ext_filename(fullname)


class BuildWheel(bdist_wheel):
    """Names in the tag of a wheel what it was built for."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tag of the wheel: of one Python where it holds the planner, of one platform where it holds operations."""
        python, abi, platform = super().get_tag()
        built = self.distribution.ext_modules or []
        if not built:
            return "py3", "none", "any"
        if all(isinstance(extension, Operations) for extension in built):
            return "py3", "none", platform
        return python, abi, platform


def extensions() -> list[Extension]:
    """What can be built here."""
    cpu, cuda = choice("SPARSE_RTRL_CPP"), choice("SPARSE_RTRL_CUDA")
    return [*(cpu_extensions(cpu) if cpu != "0" else []), *(cuda_extensions(cuda) if cuda != "0" else [])]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions, "bdist_wheel": BuildWheel})
