"""Suffixes of a circular tree by brute force, and segments at random."""

import torch
from pattern_cell import pick

from sparse_rtrl.ops import dispatch, reference
from sparse_rtrl.ops.reference import slot_entries

SLOTS, SIZE = 5, 2
HIDDEN = SLOTS * SIZE


class Dense:
    """Every segment's map as a dense matrix; suffixes multiplied one by one."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.maps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def append(self, Jh, write, support, u):
        J = torch.eye(HIDDEN, dtype=torch.float64).repeat(self.batch, 1, 1)
        full_u = torch.zeros(self.batch, HIDDEN, dtype=torch.float64)
        for b in range(self.batch):
            rows, cols = slot_entries(write[b : b + 1], SIZE)[0], slot_entries(support[b : b + 1], SIZE)[0]
            J[b, rows] = 0
            for j, col in enumerate(cols):
                J[b, rows, col] += Jh[b, :, j]
                full_u[b, col] += u[b, j]
        self.maps.append((J, full_u))

    def suffix(self, start):
        product = torch.eye(HIDDEN, dtype=torch.float64).repeat(self.batch, 1, 1)
        u = torch.zeros(self.batch, HIDDEN, dtype=torch.float64)
        for J, step_u in self.maps[start:]:
            u = u + torch.bmm(step_u.unsqueeze(1), product).squeeze(1)
            product = J @ product
        return product, u


def random_segment(batch, generator, kr=2, kw=2):
    write, read = pick(SLOTS, kw, batch, generator), pick(SLOTS, kr, batch, generator)
    support = torch.cat((read, write), 1)
    Jh = 0.6 * torch.randn(batch, kw * SIZE, (kr + kw) * SIZE, generator=generator, dtype=torch.float64)
    u = torch.randn(batch, (kr + kw) * SIZE, generator=generator, dtype=torch.float64)
    return Jh, write, support, u


def swap_products(monkeypatch):
    """Multiply maps in the wrong order, wherever the tree multiplies."""
    merge = reference.tree_merge
    monkeypatch.setattr(reference, "tree_merge", lambda *nodes: merge(*nodes[4:8], *nodes[:4], *nodes[8:]))
    for name in ("tree_append_", "suffix_product"):
        monkeypatch.setattr(dispatch, name, getattr(reference, name))
