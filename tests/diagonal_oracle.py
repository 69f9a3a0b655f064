"""Gradients of diagonal cells by plain autograd, step by step, and the loop that compares a learner with them."""

import torch
from torch import Tensor

from sparse_rtrl import RTRL, DiagonalCell, ELSTMCell, LRUCell, MambaCell, RetentionCell, RWKVCell

CELLS = {
    "lru": lambda: LRUCell(3, 5, 2, r_min=0.5, r_max=0.95),
    "elstm": lambda: ELSTMCell(3, 5, 2),
    "retention": lambda: RetentionCell(3, num_heads=2, head_size=4, output_size=2, decay=[0.9, 0.7]),
    "retention, learned decay": lambda: RetentionCell(3, 2, 3, 2, decay=[0.9, 0.7], learn_decay=True),
    "linear attention": lambda: RetentionCell(3, num_heads=2, head_size=3, output_size=2, decay=1.0),
    "retention, rotated": lambda: RetentionCell(3, 2, 4, 2, decay=[0.9, 0.7], rotation=[[0.4, 1.5], [2.5, -0.8]]),
    "retention, token shift": lambda: RetentionCell(
        3, 2, 4, 2, decay=[0.9, 0.7], rotation=[[0.4], [1.5]], learn_rotation=True, token_shift=True
    ),
    "mamba": lambda: MambaCell(3, channels=4, output_size=2, state_size=3, delta_min=0.1, delta_max=1.0),
    "rwkv": lambda: RWKVCell(3, channels=5, output_size=2),
}


def make_cell(name: str) -> DiagonalCell:
    torch.manual_seed(0)
    cell = CELLS[name]().double()
    for p in cell.parameters():  # away from equal initial values
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    return cell


def inputs(steps: int, batch: int, features: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(steps, batch, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def where(mask: Tensor, new, old):
    if isinstance(new, Tensor):
        return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)
    return tuple(where(mask, a, b) for a, b in zip(new, old, strict=True))


def detached(state):
    return state.detach() if isinstance(state, Tensor) else tuple(map(detached, state))


def gradients_of(cell) -> dict[str, Tensor]:
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in cell.named_parameters()
        if p.requires_grad
    }


def bptt(cell, x: Tensor, c: Tensor, resets=None, truncate: int | None = None) -> dict[str, Tensor]:
    """Gradient of ``sum_t <output_t, c_t>`` through the whole past, one step at a time."""
    cell.zero_grad(set_to_none=True)
    state = cell.initial_state(x.shape[1])
    loss = torch.zeros((), dtype=torch.float64)
    for t in range(len(x)):
        if resets and t in resets:
            state = where(resets[t], cell.initial_state(x.shape[1]), state)
        if truncate and t % truncate == 0:
            state = detached(state)
        output, state = cell(x[t], state)
        loss = loss + (output * c[t]).sum()
    loss.backward()
    found = gradients_of(cell)
    cell.zero_grad(set_to_none=True)
    return found


def online(learner: RTRL, x: Tensor, c: Tensor, segments, resets=None) -> dict[str, Tensor]:
    """The same gradient from a learner, in segments of the given lengths, in turn, cut short before resets."""
    cell, t, number = learner.cell, 0, 0
    cell.zero_grad(set_to_none=True)
    while t < len(x):
        if resets and t in resets:
            learner.reset(resets[t])
        stop = min([t + segments[number % len(segments)], len(x), *(r for r in (resets or {}) if r > t)])
        outputs = learner.unroll(x[t:stop]) if stop > t + 1 else learner(x[t]).unsqueeze(0)
        if bool(c[t:stop].any()):
            (outputs * c[t:stop]).sum().backward()
        t, number = stop, number + 1
    return gradients_of(cell)
