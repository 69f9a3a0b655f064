"""Random slot cells, with the routing of every step prescribed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_rtrl
from sparse_rtrl import ExpertBank, Routing, SlotCell

from .draw import Draw
from .parts import Mapped, Scaled, parametrize_weight, spread

INPUTS = 3
"""Input features that carry numbers; after them come a rare flag per stream and the number of the step."""

OPERATIONS = (
    "scale",
    "scalar",
    "where",
    "assign",
    "function",
    "map function",
    "multiplied gate",
    "late branch",
    "cumsum",
    "indexed",
    "product of weights",
    "bilinear",
    "tied",
    "normed",
    "einsum",
    "gru",
    "softmaxed",
    "rms",
    "left product",
)
"""What may be done to the candidate content of the written slots."""


class DeepBank(ExpertBank):
    """Experts of two layers."""

    def __init__(self, num_experts: int, size: int) -> None:
        super().__init__(num_experts, size, size)
        self.outer = nn.Parameter(torch.randn(num_experts, size, size) / size**0.5)
        self.gain = nn.Parameter(torch.ones(num_experts, size))

    def forward(self, z: Tensor, experts: Tensor) -> Tensor:
        hidden = torch.tanh(super().forward(z, experts))
        return torch.einsum("bkij,bkj->bki", self.outer[experts], hidden) * self.gain[experts]


class RandomSlotCell(SlotCell):
    """A gated write to some slots, from the input, some of the slots, and some experts.

    Args:
        draw: what it is made of.
        steps: number of steps that are prescribed.
        batch: streams.
        parametrized: whether weights may be parametrized.
    """

    def __init__(self, draw: Draw, steps: int, batch: int, parametrized: bool = True) -> None:
        slots, size = draw.integer(1, 4), draw.integer(3, 4)
        experts = draw.one_of(0, 0, 2, 3, 5)
        super().__init__(slots, size, experts)
        self.draw_pattern(draw, steps, batch)
        self.look = draw.one_of("sum", "attention", "mean")
        self.named = draw.chance(0.5)
        self.gated = draw.one_of("sigmoid", "scalar", "none", "old")
        self.operations = draw.some_of(OPERATIONS, 0, 3)
        self.opens = draw.integer(1, max(1, steps - 2))
        self.per_step_output = draw.chance(0.3)

        self.encode = nn.Linear(INPUTS, size, bias=draw.chance(0.8))
        self.mix = nn.Linear(size, size)
        if self.named:
            self.names = nn.Embedding(slots, size)
        if self.look == "attention":
            self.query, self.key, self.value = nn.Linear(INPUTS, size), nn.Linear(size, size), nn.Linear(size, size)
        self.bank_kind = "none"
        if experts:
            self.bank_kind = draw.one_of("bank", "bank", "deep bank", "list")
            if self.bank_kind == "list":
                self.experts = nn.ModuleList([nn.Linear(size, size) for _ in range(experts)])
            else:
                deep = self.bank_kind == "deep bank"
                self.experts = DeepBank(experts, size) if deep else ExpertBank(experts, size, size, draw.chance(0.8))
        if self.gated == "sigmoid":
            self.gate = nn.Linear(size, size)
        elif self.gated == "scalar":
            self.gate_logit = nn.Parameter(torch.zeros(()))
        self.make_operations(size, slots)
        if self.per_step_output:
            self.out_scale = nn.Parameter(torch.ones(2))
        self.readout = nn.Linear(2 * size, 2)
        spread(self, draw, 0.2)
        self.parametrization = ""
        if parametrized and draw.chance(0.2):
            self.parametrization = parametrize_weight(self.mix, draw)
        self.frozen = self.freeze(draw)
        self.initial = "zeros"

    def draw_pattern(self, draw: Draw, steps: int, batch: int) -> None:
        """Prescribe what each step reads, writes and runs."""
        slots, experts = self.num_slots, self.num_experts
        self.pattern_kind = draw.one_of("random", "overlap", "disjoint", "all", "no write", "same", "no read")
        kr, kw = draw.integer(1, slots), draw.integer(1, slots)
        if self.pattern_kind == "disjoint":
            kr = draw.integer(0, slots - 1)
            kw = slots - kr
        k = draw.integer(1, min(2, experts)) if experts else 0
        rare = draw.chance(0.7)  # experts from the back are rare then, and the last one never runs

        def pick(count: int, number: int) -> Tensor:
            return torch.stack([draw.order(number)[:count] for _ in range(batch)]).view(batch, count)

        self.pattern: list[Routing] = []
        for t in range(steps):
            read, write = pick(kr, slots), pick(kw, slots)
            if self.pattern_kind == "overlap":
                read = write.flip(1)
            elif self.pattern_kind == "disjoint":
                both = pick(slots, slots)
                read, write = both[:, :kr], both[:, kr:]
            elif self.pattern_kind == "all":
                read, write = pick(slots, slots), pick(slots, slots)
            elif self.pattern_kind == "no write" and draw.chance(0.4):
                write = write[:, :0]
            elif self.pattern_kind == "no read":
                read = read[:, :0]
            elif self.pattern_kind == "same" and t:
                read, write = self.pattern[0].read, self.pattern[0].write
            running = pick(k, experts)
            if rare and experts > k:
                usual = draw.order(min(k + 1, experts))[:k]
                often = torch.stack([usual for _ in range(batch)]).view(batch, k)
                here = torch.tensor([draw.chance(0.25) for _ in range(batch)])
                rest = pick(k, max(experts - 1, k))
                running = torch.where(here.view(-1, 1), rest, often)
            self.pattern.append(Routing(read, write, running))

    def make_operations(self, size: int, slots: int) -> None:
        """Parameters of the operations."""
        for name in self.operations:
            if name in ("scale", "function", "multiplied gate", "late branch", "where", "assign"):
                setattr(self, f"p_{name.replace(' ', '_')}", nn.Parameter(torch.randn(size) * 0.5 + 0.7))
            elif name == "scalar":
                self.p_scalar = nn.Parameter(torch.tensor(0.8))
            elif name in ("map function", "einsum", "indexed"):
                shape = (slots, size) if name == "indexed" else (size, size)
                setattr(self, f"p_{name.replace(' ', '_')}", nn.Parameter(torch.randn(shape) / size**0.5))
            elif name == "product of weights":
                self.p_left = nn.Parameter(torch.randn(size, 2) * 0.6)
                self.p_right = nn.Parameter(torch.randn(2, size) * 0.6)
            elif name == "bilinear":
                self.p_bilinear = nn.Bilinear(size, INPUTS, size)
            elif name == "tied":
                self.p_tied = nn.Linear(size, size)
                self.p_tied.weight = self.encode_square = nn.Linear(size, size).weight
            elif name == "normed":
                self.p_norm = nn.LayerNorm(size)
            elif name == "rms":
                self.p_rms = nn.RMSNorm(size)
            elif name == "gru":
                self.p_gru = nn.GRUCell(INPUTS, size)
            elif name == "softmaxed":
                self.p_logits = nn.Parameter(torch.randn(size))
            elif name == "left product":
                self.p_slots = nn.Parameter(torch.randn(slots, slots) / slots**0.5)

    def freeze(self, draw: Draw) -> str:
        """Freeze some of the parameters, sometimes; returns what."""
        if self.bank_kind != "none" and draw.chance(0.1):
            self.experts.requires_grad_(False)
            return "experts"
        if draw.chance(0.1):
            names = [n for n, _ in self.named_parameters() if n != "encode.weight"]
            for name in draw.some_of(names, 1, 3):
                self.get_parameter(name).requires_grad_(False)
            return "some"
        return ""

    def set_initial(self, kind: str) -> None:
        """Start from zeros, from fixed content, or from content that is trained."""
        self.initial = kind
        content = 0.5 * torch.randn(self.num_slots, self.slot_size)
        if kind == "fixed":
            self.register_buffer("first", content)
        elif kind == "trained":
            self.first = nn.Parameter(content)

    def initial_state(self, batch_size: int) -> Tensor:
        if self.initial == "zeros":
            return super().initial_state(batch_size)
        if self.initial == "fixed":
            return self.first.expand(batch_size, -1, -1).clone()
        return self.first.expand(batch_size, -1, -1)

    def route(self, x: Tensor, state: Tensor) -> Routing:
        return self.pattern[int(x[0, -1])]

    def update(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        token = torch.tanh(self.encode(x[:, :INPUTS]))
        mixed = token + self.mix(self.seen(x, h_read, h_write, routing))
        mixed = mixed + self.proposals(mixed, routing)
        candidate = mixed.unsqueeze(1) + 0.5 * h_write
        for name in self.operations:
            candidate = self.operate(name, candidate, x, h_write, routing)
        new = torch.tanh(candidate)
        if self.gated == "sigmoid":
            gate = torch.sigmoid(self.gate(h_write))
            new = (1 - gate) * h_write + gate * new
        elif self.gated == "scalar":
            new = torch.lerp(h_write, new, torch.sigmoid(self.gate_logit))
        elif self.gated == "old":
            new = 0.5 * h_write + 0.5 * new
        if "assign" in self.operations:
            new = new.clone()
            new[x[:, -2] > 0] = self.p_assign
        written = new.sum(1)
        output = self.readout(torch.cat((token + h_read.sum(1), written), 1))
        return new, output * self.out_scale if self.per_step_output else output

    def seen(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> Tensor:
        """One vector from the slots that the step may look at."""
        slots = torch.cat((h_read, h_write), 1)
        if self.named:
            slots = slots + self.names(routing.support)
        if self.look == "attention":
            scores = torch.einsum("bd,bkd->bk", self.query(x[:, :INPUTS]), self.key(slots))
            return (scores.softmax(1).unsqueeze(-1) * self.value(slots)).sum(1)
        return slots.sum(1) if self.look == "sum" else slots.sum(1) / max(1, slots.shape[1])

    def proposals(self, mixed: Tensor, routing: Routing) -> Tensor | float:
        """What the active experts add."""
        k = routing.experts.shape[1]
        if not k:
            return 0.0
        if self.bank_kind == "list":
            chosen = F.one_hot(routing.experts, self.num_experts).sum(1).to(mixed.dtype)  # (B, E)
            return sum(chosen[:, e : e + 1] * torch.tanh(expert(mixed)) for e, expert in enumerate(self.experts))
        z = mixed.unsqueeze(1).expand(-1, k, -1)
        return torch.tanh(self.experts(z, routing.experts)).sum(1)

    def operate(self, name: str, c: Tensor, x: Tensor, h_write: Tensor, routing: Routing) -> Tensor:
        """One operation on the candidate ``(B, kw, D)``."""
        step, flag = x[:, -1].view(-1, 1, 1), (x[:, -2] > 0).view(-1, 1, 1)
        if name == "scale":
            return c * self.p_scale
        if name == "scalar":
            return self.p_scalar * c
        if name == "where":
            return torch.where(flag, self.p_where, c)
        if name == "function":
            return Scaled.apply(c, self.p_function)
        if name == "map function":
            return Mapped.apply(c, self.p_map_function)
        if name == "multiplied gate":
            return c + (step >= self.opens) * self.p_multiplied_gate
        if name == "late branch":
            # Row by row: a learner may run the rows of several steps together.
            return torch.where(step >= self.opens, c + self.p_late_branch, c) if bool((step >= self.opens).any()) else c
        if name == "cumsum":
            return c.cumsum(1) / max(1, c.shape[1])
        if name == "indexed":
            return c + self.p_indexed[routing.write] * torch.tanh(h_write)
        if name == "product of weights":
            return c + torch.tanh(h_write) @ (self.p_left @ self.p_right)
        if name == "bilinear":
            positions = x[:, None, :INPUTS].expand(-1, c.shape[1], -1)
            return 0.5 * c + 0.5 * self.p_bilinear(torch.tanh(c), positions.contiguous())
        if name == "tied":
            return c + self.p_tied(torch.tanh(h_write @ self.encode_square))
        if name == "normed":
            return self.p_norm(c)
        if name == "rms":
            return self.p_rms(c + 0.1)
        if name == "einsum":
            return c + torch.einsum("bkd,ed->bke", h_write, self.p_einsum)
        if name == "gru":
            positions = x[:, None, :INPUTS].expand(-1, c.shape[1], -1)
            return self.p_gru(positions.reshape(-1, INPUTS), c.reshape(-1, c.shape[-1])).view_as(c)
        if name == "softmaxed":
            return c * self.p_logits.softmax(0) * self.slot_size
        if name == "left product":
            kw = c.shape[1]
            return c + self.p_slots[:kw, :kw] @ torch.tanh(c)
        return c


def moe_cell(draw: Draw, kind: str) -> SlotCell:
    """One of the ready cells."""
    slots, experts = draw.integer(2, 4), draw.integer(2, 5)
    sizes = {
        "input_size": INPUTS + 2,
        "slot_size": 4,
        "num_slots": slots,
        "num_experts": experts,
        "top_k": draw.integer(1, min(2, experts)),
        "read_slots": draw.integer(1, slots),
        "write_slots": draw.integer(1, min(2, slots)),
        "output_size": 2,
    }
    if kind == "sparse latent moe":
        cell: SlotCell = sparse_rtrl.SparseLatentMoECell(**sizes, gate_bias=draw.uniform(-1, 0))
    else:
        weights = "sigmoid" if sizes["read_slots"] == 1 else draw.one_of("sigmoid", "softmax")
        cell = sparse_rtrl.SlotMoECell(
            **sizes,
            num_heads=draw.one_of(1, 2, 4),
            gate_bias=draw.uniform(-0.5, 0.2),
            write_to=draw.one_of("important", "least_used"),
            read_weights=weights,
        )
    spread(cell, draw, 0.1)
    if draw.chance(0.1):
        cell.experts.requires_grad_(False)
    elif draw.chance(0.1):
        cell.get_parameter(draw.one_of("slot_table", "readout.key_value.weight")).requires_grad_(False)
    return cell
