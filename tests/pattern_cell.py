"""A small slot cell that follows a prescribed routing, and ways to prescribe one."""

import torch
from torch import Tensor, nn

from sparse_rtrl import ExpertBank, Routing, SlotCell


class PatternCell(SlotCell):
    """Reads, writes and runs what ``pattern[t]`` says; the step number ``t`` is the last input feature.

    It uses every kind of map that the capture knows, and one parameter (``scale``) in a way it does not know.
    """

    def __init__(
        self,
        pattern: list[Routing],
        num_slots: int = 4,
        slot_size: int = 3,
        num_experts: int = 5,
        input_size: int = 3,
        dense: bool = True,
    ) -> None:
        super().__init__(num_slots, slot_size, num_experts)
        self.pattern = pattern
        self.encode = nn.Linear(input_size, slot_size)
        self.mix = nn.Linear(2 * slot_size, slot_size)
        self.gate = nn.Linear(slot_size, slot_size)
        self.norm = nn.LayerNorm(slot_size)
        self.names = nn.Embedding(num_slots, slot_size)
        self.experts = ExpertBank(num_experts, slot_size, slot_size)
        self.scale = nn.Parameter(torch.full((slot_size,), 1.1)) if dense else None
        self.readout = nn.Linear(2 * slot_size, 2)

    def route(self, x: Tensor, state: Tensor) -> Routing:
        routing = self.pattern[int(x[0, -1])]
        return Routing(*(index.to(x.device) for index in (routing.read, routing.write, routing.experts)))

    def update(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        token = torch.tanh(self.encode(x[:, :-1]))
        seen = self.norm(torch.cat((h_read, h_write), 1) + self.names(routing.support))
        seen = seen.sum(1) if seen.shape[1] else torch.zeros_like(token)
        mixed = self.mix(torch.cat((token, seen), 1))
        if routing.experts.shape[1]:
            z = mixed.unsqueeze(1).expand(-1, routing.experts.shape[1], -1)
            mixed = mixed + torch.tanh(self.experts(z, routing.experts)).sum(1)
        if self.scale is not None:
            mixed = mixed * self.scale
        gate = torch.sigmoid(self.gate(h_write) - 0.5)
        h_write_new = (1 - gate) * h_write + gate * torch.tanh(mixed.unsqueeze(1) + self.names(routing.write))
        written = h_write_new.sum(1) if h_write_new.shape[1] else torch.zeros_like(token)
        return h_write_new, self.readout(torch.cat((seen, written), 1))


def pick(num: int, k: int, batch: int, generator: torch.Generator) -> Tensor:
    """``k`` distinct indices below ``num`` per stream."""
    return torch.stack([torch.randperm(num, generator=generator)[:k] for _ in range(batch)])


def make_pattern(
    kind: str, steps: int, batch: int, num_slots: int = 4, num_experts: int = 5, seed: int = 0
) -> list[Routing]:
    """Routings of ``steps`` steps.

    Kinds: ``random`` (per stream, read and write overlap by chance), ``overlap`` (read equals write), ``disjoint``,
    ``all`` (every slot), ``no_write`` (every third step writes nothing). Expert 0 is always active; expert
    ``num_experts - 1`` never; expert 1 every 5th step; expert 2 once every 9 steps; expert 3 in streams of even number
    at random; the lists are padded to two experts a step with expert 3.
    """
    generator = torch.Generator().manual_seed(seed)
    out = []
    for t in range(steps):
        kr, kw = 2, 2
        read, write = pick(num_slots, kr, batch, generator), pick(num_slots, kw, batch, generator)
        if kind == "overlap":
            write = read.flip(1)
        elif kind == "disjoint":
            both = pick(num_slots, 4, batch, generator)
            read, write = both[:, :2], both[:, 2:]
        elif kind == "all":
            read, write = pick(num_slots, num_slots, batch, generator), pick(num_slots, num_slots, batch, generator)
        elif kind == "no_write" and t % 3 == 1:
            write = write[:, :0]
        second = torch.full((batch,), 3)
        if t % 5 == 4:
            second[torch.rand(batch, generator=generator) < 0.7] = 1
        if t % 9 == 8:
            second[:] = 2
        out.append(Routing(read, write, torch.stack((torch.zeros(batch, dtype=torch.int64), second), 1)))
    return out
