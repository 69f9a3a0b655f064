"""Notices a second state that a module keeps inside and that is cut off its graph between two segments.

A tensor in an attribute may be a record that nobody reads, or a state that the next step goes on from. A state must be
cut off the graph between two segments, or the next backward pass would run through it. If it is still attached, it
shows in the graph of the next segment; if it was cut, it is noticed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_rtrl.errors import ContractError

_MODULE_FIELDS = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
_NO_HOLDERS = (nn.Module, ModuleType, FunctionType, MethodType, type, torch.dtype, torch.device, torch.Generator)
_MOVES = (
    *("Cat", "Stack", "Permute", "Transpose", "View", "UnsafeView", "ReshapeAlias", "Clone", "ToCopy", "Squeeze"),
    "Unsqueeze",
)
"""Beginnings of the names of nodes that put the tensors of a state side by side."""


class HiddenStates:
    """Watches the tensors that a module's attributes hold at the end of a segment.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._handles: list[Any] = []

    def watch(self, end: Tensor) -> None:
        """Look again when a submodule that holds a tensor of the segment is called the next time.

        Args:
            end: state that left the segment, ``(B, H)``; tensors that are a part of it are no second state.
        """
        self.forget()
        for prefix, owner in self.module.named_modules():
            held = [(n, t) for n, t in _tensors_of(owner) if t.grad_fn is not None and not _is_part(t, end)]
            if held:
                look = _Look(prefix, {name: tensor.detach().clone() for name, tensor in held})
                self._handles.append(owner.register_forward_pre_hook(look))

    def forget(self) -> None:
        """Stop looking."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Look:
    """Looks once, when a submodule is called, whether tensors that it held have been cut off their graph."""

    def __init__(self, prefix: str, held: dict[str, Tensor]) -> None:
        self.prefix = prefix
        self.held = held

    def __call__(self, owner: nn.Module, _: Any) -> None:
        held, self.held = self.held, {}
        if not held:
            return
        for name, tensor in _tensors_of(owner):
            before = held.get(name)
            if before is None or tensor.requires_grad or tensor.shape != before.shape:
                continue
            if torch.equal(tensor, before):
                full = f"{self.prefix}.{name}" if self.prefix else name
                raise ContractError(
                    [
                        f"module.{full} holds a tensor {tuple(tensor.shape)} that was computed in the segment before"
                        " and has been detached since: a second state that the module keeps inside is not carried. Let"
                        " the module take it and return it as a part of the state (for snnTorch init_hidden=False); if"
                        " it is only a record, delete it instead of detaching it"
                    ]
                )


def _tensors_of(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the attributes of one module, those in containers and plain objects too, by a name for each."""
    for attribute, value in [*vars(owner).items(), *owner._buffers.items()]:
        if attribute in _MODULE_FIELDS or value is None:
            continue
        if any(f"{attribute}_{part}" in owner._parameters for part in ("orig", "g", "v")):
            continue  # a weight that weight_norm, spectral_norm or prune makes anew from its parameters
        yield from ((attribute + path, leaf) for path, leaf in _leaves(value) if isinstance(leaf, Tensor))


def _leaves(value: Any) -> list[tuple[str, Any]]:
    """What an attribute holds, by a path for each: itself, the leaves of a container, the attributes of an object."""
    if isinstance(value, Tensor):
        return [("", value)]
    if isinstance(value, (tuple, list, dict)):
        return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(value)[0]]
    if hasattr(value, "__dict__") and not isinstance(value, _NO_HOLDERS):
        return [(f".{name}", leaf) for name, leaf in vars(value).items()]
    return []


def _is_part(tensor: Tensor, end: Tensor) -> bool:
    """Whether a flat state ``(B, H)`` was put together from a tensor: only by moving its entries."""
    stack = [end.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if node is tensor.grad_fn:
            return True
        if node.name().startswith(_MOVES):
            stack += [source for source, _ in node.next_functions]
    return False
