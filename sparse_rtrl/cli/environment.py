"""What this installation consists of, for bug reports and benchmark headers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import psutil
import torch

from sparse_rtrl.ops import dispatch


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def compiled_parts() -> list[str]:
    """File names of the compiled libraries that lie in the installed package."""
    folder = Path(__file__).parents[1]
    return sorted(path.name for path in folder.glob("*.so"))


def backends() -> list[str]:
    """Backends that operations can use here; the reference is always there."""
    found = ["reference (plain PyTorch, any device)"]
    for problem, backend in ((dispatch.cuda_problem, "CUDA C++"), (dispatch.compiled_problem, "C++ (CPU)")):
        found.append(f"{backend}: no, {problem}" if problem else backend)
    if importlib.util.find_spec("sparse_rtrl.triton_kernels") and importlib.util.find_spec("triton"):
        found.append("Triton")
    return found


def describe_environment() -> dict[str, str]:
    """Versions, hardware and backends, as texts by name."""
    parts = compiled_parts()
    memory = psutil.virtual_memory()
    cuda = "no, this torch is a CPU build"
    if torch.version.cuda:
        cuda = f"torch built for {torch.version.cuda}, device {'found' if torch.cuda.is_available() else 'not found'}"
    return {
        "sparse_rtrl": _version("sparse_rtrl"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available",
        "CUDA": cuda,
        "compiled parts": ", ".join(parts) or "none",
        "backends": ", ".join(backends()),
    }
