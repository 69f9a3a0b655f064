"""Import paths of version 0.1, for one release: ``sparse_rtrl.slot_cell`` is ``sparse_rtrl.cells.slot_cell`` now."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

MOVED = {
    "baselines": "training.baselines",
    "block_rtrl": "learners.block_rtrl",
    "carry": "learners.carry",
    "carry_estimate": "influence.carry_estimate",
    "check": "learners.check_cell",
    "checkpoint": "training.checkpoint",
    "commands": "cli.commands",
    "contestant": "cli.experiment",
    "corpora": "training.corpora",
    "cuda_graph": "learners.cuda_graph",
    "diagonal_cell": "cells.diagonal_cell",
    "diagonal_engine": "learners.diagonal_engine",
    "diagonal_influence": "influence.diagonal",
    "diagonal_learner": "learners.diagonal_rtrl",
    "diagonal_stack": "learners.diagonal_stack",
    "diagonal_structure": "capture.diagonal_structure",
    "engine": "learners.engine",
    "entry": "learners.entry",
    "environment": "cli.environment",
    "estimate": "influence.estimate",
    "evaluation": "training.evaluation",
    "experiments": "cli.comparisons",
    "expert_bank": "cells.expert_bank",
    "factor_capture": "capture.factor_capture",
    "gradient_check": "training.gradient_check",
    "gradient_method": "training.gradient_method",
    "graph_capture": "capture.graph_capture",
    "jacobian": "capture.jacobian",
    "learner": "learners.rtrl",
    "lyapunov": "training.lyapunov",
    "measurement": "cli.measurement",
    "parameter_uses": "capture.parameter_uses",
    "parameters": "capture.parameters",
    "plan": "influence.plan",
    "plots": "cli.plots",
    "precision": "ops.precision",
    "reference": "ops.reference",
    "report": "cli.report",
    "routing_usage": "training.routing_usage",
    "run": "training.run",
    "run_plots": "cli.run_plots",
    "run_report": "cli.run_report",
    "runlog": "training.runlog",
    "segment": "capture.segment",
    "slot_cell": "cells.slot_cell",
    "slot_moe_pass": "cells.slot_moe_pass",
    "streams": "training.streams",
    "tasks": "training.tasks",
    "tree": "influence.tree",
    "triton_backend": "ops.triton_backend",
    "methods": "learners.methods",
}
"""Where a module of version 0.1 is now."""

PACKAGES = {
    "sparse_rtrl.ops": "sparse_rtrl.ops.dispatch",
    "sparse_rtrl.influence": "sparse_rtrl.influence.sparse",
}
"""Packages that have the name of a module of version 0.1; ``cli`` and ``training`` have no public name but ``app``."""


class MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules under their old paths, with a warning that names the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for an old path; None for any other."""
        package, _, name = fullname.partition(".")
        if package != "sparse_rtrl" or name.split(".")[0] not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module at its new path."""
        first, _, rest = spec.name.partition(".")[2].partition(".")
        new = ".".join(filter(None, ("sparse_rtrl", MOVED[first], rest)))
        warnings.warn(f"{spec.name} is {new} now; the old path goes with version 0.3", DeprecationWarning, stacklevel=2)
        return importlib.import_module(new)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


def _forwarded(package: str, module: str) -> Callable[[str], Any]:
    """``__getattr__`` of a package that has the name of a module of version 0.1."""

    def get(name: str) -> Any:
        found = getattr(sys.modules.get(module), name, None) if not name.startswith("_") else None
        if found is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(
            f"{package}.{name} is {module}.{name} now; the old path goes with version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return get


def find_moved_modules() -> None:
    """Let imports of old paths find the modules, and the names of those that are packages now."""
    sys.meta_path.insert(0, MovedFinder())
    for package, module in PACKAGES.items():
        vars(sys.modules[package])["__getattr__"] = _forwarded(package, module)
