"""The textbook recursion ``P <- J P + F``, one backward pass per state entry and stream, nothing clever."""

import torch
from torch import Tensor


class Recursion:
    """Influence of some tensors on a state ``(B, H)``, dense.

    Args:
        batch: streams.
        hidden: state entries.
    """

    def __init__(self, batch: int, hidden: int) -> None:
        self.batch, self.hidden = batch, hidden
        self.P: dict[str, Tensor] = {}

    def _matrix(self, name: str, like: Tensor) -> Tensor:
        if name not in self.P:
            self.P[name] = torch.zeros(self.batch, self.hidden, like.numel(), dtype=like.dtype)
        return self.P[name]

    def gradient(self, loss: Tensor, h: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """``dL/dh · P + dL/dθ`` for a loss of the step that starts from ``h``."""
        u, *direct = torch.autograd.grad(loss, [h, *leaves.values()], retain_graph=True, allow_unused=True)
        out = {}
        for (name, leaf), part in zip(leaves.items(), direct, strict=True):
            through = (
                leaf.new_zeros(leaf.numel()) if u is None else torch.einsum("bh,bhn->n", u, self._matrix(name, leaf))
            )
            out[name] = through.view(leaf.shape) + (0 if part is None else part)
        return out

    def advance(self, new: Tensor, h: Tensor, leaves: dict[str, Tensor]) -> None:
        """Move the influence through the step from ``h`` to ``new``, both ``(B, H)``."""
        moved = {name: torch.zeros_like(self._matrix(name, leaf)) for name, leaf in leaves.items()}
        for b in range(self.batch):
            for i in range(self.hidden):
                if not new.requires_grad:
                    continue
                row, *parts = torch.autograd.grad(
                    new[b, i], [h, *leaves.values()], retain_graph=True, allow_unused=True
                )
                for (name, leaf), part in zip(leaves.items(), parts, strict=True):
                    past = 0 if row is None else row[b] @ self._matrix(name, leaf)[b]
                    moved[name][b, i] = past + (0 if part is None else part.flatten())
        self.P = moved

    def forget(self, streams: Tensor) -> None:
        """Clear the influence on some streams ``(B,)`` bool."""
        for P in self.P.values():
            P[streams] = 0
