"""The gated orthogonal highway cell: attention over read slots, a mixture of experts, a gated write to a few slots."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sparse_rtrl.cells.expert_bank import ExpertBank
from sparse_rtrl.cells.registry import register_cell
from sparse_rtrl.cells.slot_cell import Routing, SlotCell, gather_slots
from sparse_rtrl.cells.slot_moe_pass import SlotMoEPass


def check_sizes(
    *,
    input_size: int,
    num_slots: int,
    num_experts: int,
    top_k: int,
    read_slots: int,
    write_slots: int,
    output_size: int,
) -> None:
    """Raise ``ValueError`` unless the sizes of a slot mixture-of-experts cell fit together."""
    for name, value, most, bound in (
        ("input_size", input_size, None, None),
        ("output_size", output_size, None, None),
        ("num_experts", num_experts, None, None),
        ("top_k", top_k, num_experts, "num_experts"),
        ("read_slots", read_slots, num_slots, "num_slots"),
        ("write_slots", write_slots, num_slots, "num_slots"),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if most is not None and value > most:
            raise ValueError(f"{name} must be at most {bound}={most}, got {value}")


class OutputAttention(nn.Module):
    """Output of a step: one query from the input attends to the slots the step touched, with values of output size.

    ``output = softmax(q(x) · k(s) / √D) v(s) + skip(x)`` over the positions ``s``.

    Args:
        input_size: size of the input of a step.
        slot_size: numbers per slot ``D``.
        output_size: size of the output.
    """

    def __init__(self, input_size: int, slot_size: int, output_size: int) -> None:
        super().__init__()
        self.sizes = (slot_size, output_size)
        self.query_skip = nn.Linear(input_size, slot_size + output_size)
        self.key_value = nn.Linear(slot_size, slot_size + output_size, bias=False)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        """Attend to the slots.

        Args:
            x: input of the step, ``(B, input_size)``.
            slots: content of the old read slots and the new written slots, ``(B, kr + kw, D)``.

        Returns:
            ``(B, output_size)``.
        """
        query, skip = self.query_skip(x).split(self.sizes, dim=-1)
        key, value = self.key_value(slots).split(self.sizes, dim=-1)
        scores = torch.matmul(key, query.unsqueeze(-1)) / math.sqrt(self.sizes[0])  # (B, kr + kw, 1)
        return torch.matmul(scores.softmax(1).transpose(1, 2), value).squeeze(1) + skip


@register_cell("slot-moe", options=("write_to", "read_weights"))
class SlotMoECell(SlotCell):
    r"""Gated orthogonal highway cell with slot memory and a sparse mixture of experts.

    A slot is seen as its content plus a learned identity, ``s_i = h_i + table_i``, so that slots differ before anything
    was written. With ``(q, u)`` a linear map of the input and ``(k_i, v_i)`` one of ``s_i``, per attention head

    .. math::
        c &= \sum_{i \in read} \sigma(q \cdot k_i / \sqrt{d}) \, v_i, \qquad z = u + c, \\
        (a, b) &= \mathrm{control}(z), \qquad (m_e, r_e) = W_e z + w_e, \qquad
        m = \sum_{e \in experts} \sigma(r_e) \, m_e, \\
        g_i &= \mathrm{clip}(\tfrac12 + \tfrac12 a + \tfrac16 b \cdot s_i / \sqrt{D}, 0, 1), \\
        \tilde h_i &= \tanh(Q h_i + m), \qquad Q^\top Q = I, \\
        h_i &\leftarrow (1 - g_i) \odot h_i + g_i \odot \tilde h_i \qquad \text{for } i \in write.

    Read are the slots with the largest scores ``q · k_i``, summed over the heads; written those with the largest
    importance ``b · s_i``, or the least used ones; active the experts with the largest ``r_e``, the last output of each
    expert: the row that routes to an expert belongs to it, so the core does not grow with their number. Each score is
    also the soft weight of what it selects, so selection trains. Sigmoid weights train also when only one item is
    selected; a softmax over the read slots may take their place. The piecewise linear gate can close completely, so
    that content survives any number of steps; a sigmoid only gets small, and its leak empties a slot after some
    thousand steps.

    Args:
        input_size: size of the input of a step.
        slot_size: numbers per slot ``D``.
        num_slots: number of slots ``S``.
        num_experts: number of experts ``E``.
        top_k: experts active in a step.
        read_slots: slots read in a step.
        write_slots: slots written in a step.
        output_size: size of the output.
        num_heads: attention heads; must divide ``slot_size``.
        gate_bias: initial bias of ``a``; the more negative, the longer an untrained cell remembers. At or below -1 the
            gates of an untrained cell are closed and do not train.
        write_to: ``"important"`` writes the slots of largest importance, so that what is stored decides where it goes
            and two things may get the same slot; ``"least_used"`` those whose content is smallest (allocation, Graves
            et al. 2016), so that every new thing gets a slot of its own while one is free; later the smallest content
            goes. Take it with ``write_slots=1`` and ``read_slots=num_slots`` where many things are stored and found
            again by what they hold. Slots that need no identity of their own to be chosen then begin with a small one.
        read_weights: ``"sigmoid"``, or ``"softmax"`` over the read slots. Take the softmax where one stored thing must
            be found among many; with ``read_slots=1`` it is constant, and reads do not train.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        input_size: int,
        slot_size: int,
        num_slots: int,
        num_experts: int,
        top_k: int,
        read_slots: int,
        write_slots: int,
        output_size: int,
        num_heads: int = 4,
        gate_bias: float = -0.5,
        write_to: Literal["important", "least_used"] = "important",
        read_weights: Literal["sigmoid", "softmax"] = "sigmoid",
    ) -> None:
        super().__init__(num_slots, slot_size, num_experts)
        if write_to not in ("important", "least_used"):
            raise ValueError(f"write_to must be 'important' or 'least_used', got {write_to!r}")
        if read_weights not in ("sigmoid", "softmax"):
            raise ValueError(f"read_weights must be 'sigmoid' or 'softmax', got {read_weights!r}")
        if read_weights == "softmax" and read_slots == 1:
            raise ValueError(
                "read_slots must be at least 2 with read_weights='softmax', which is constant for 1; got 1"
            )
        check_sizes(
            input_size=input_size,
            num_slots=num_slots,
            num_experts=num_experts,
            top_k=top_k,
            read_slots=read_slots,
            write_slots=write_slots,
            output_size=output_size,
        )
        if num_heads < 1 or slot_size % num_heads:
            raise ValueError(f"num_heads must divide slot_size={slot_size}, got {num_heads}")
        self.input_size = input_size
        self.output_size = output_size
        self.top_k = top_k
        self.read_slots = read_slots
        self.write_slots = write_slots
        self.num_heads = num_heads
        self.write_to = write_to
        self.read_weights = read_weights

        self.slot_table = nn.Parameter(torch.randn(num_slots, slot_size) * (0.1 if write_to == "least_used" else 1.0))
        self.query_token = nn.Linear(input_size, 2 * slot_size)
        self.key_value = nn.Linear(slot_size, 2 * slot_size, bias=False)
        self.control = nn.Linear(slot_size, 2 * slot_size)
        self.experts = ExpertBank(num_experts, slot_size, slot_size + 1)
        self.core = parametrizations.orthogonal(nn.Linear(slot_size, slot_size, bias=False), orthogonal_map="cayley")
        self.readout = OutputAttention(input_size, slot_size, output_size)
        nn.init.kaiming_normal_(self.query_token.weight)
        with torch.no_grad():
            self.control.bias[:slot_size] = gate_bias

    def extra_repr(self) -> str:
        """Sizes of the cell, for ``print``."""
        return (
            f"num_slots={self.num_slots}, slot_size={self.slot_size}, top_k={self.top_k}, "
            f"read_slots={self.read_slots}, write_slots={self.write_slots}, num_heads={self.num_heads}, "
            f"write_to={self.write_to}, read_weights={self.read_weights}"
        )

    def fused_pass(self) -> SlotMoEPass | None:
        """Its compiled operations; a subclass, whose equations may be others, has none."""
        return SlotMoEPass(self) if type(self) is SlotMoECell else None

    def _heads(self, vectors: Tensor) -> Tensor:
        return vectors.unflatten(-1, (self.num_heads, -1))

    def _attention(self, scores: Tensor) -> Tensor:
        """Weights of the read slots from their scores, ``(B, kr, heads, ...)`` both."""
        scores = scores / math.sqrt(self.slot_size // self.num_heads)
        return torch.sigmoid(scores) if self.read_weights == "sigmoid" else scores.softmax(1)

    def route(self, x: Tensor, state: Tensor) -> Routing:
        """Choose slots by attention score and importance, and experts by router logit; see the class docstring.

        Args:
            x: input of the step, ``(B, input_size)``.
            state: ``(B, S, D)``.

        Returns:
            Indices of the step.
        """
        slots = state + self.slot_table
        query, token = self.query_token(x).chunk(2, dim=-1)
        key, value = self.key_value(slots).chunk(2, dim=-1)
        scores = (self._heads(key) * self._heads(query).unsqueeze(1)).sum(-1)  # (B, S, heads)
        read = scores.sum(-1).topk(self.read_slots, dim=1).indices
        weights = self._attention(gather_slots(scores, read))
        context = (weights.unsqueeze(-1) * self._heads(gather_slots(value, read))).sum(1).flatten(1)
        mixed = token + context
        write_query = self.control(mixed)[:, self.slot_size :]
        assert self.experts.bias is not None
        logits = F.linear(mixed, self.experts.weight[:, -1], self.experts.bias[:, -1])  # (B, E)
        if self.write_to == "least_used":
            write = state.square().sum(-1).argsort(dim=1, stable=True)[:, : self.write_slots]
        else:
            importance = torch.matmul(slots, write_query.unsqueeze(-1)).squeeze(-1)  # (B, S)
            write = importance.topk(self.write_slots, dim=1).indices
        return Routing(read, write, logits.topk(self.top_k, dim=1).indices)

    def transition(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> Tensor:
        """New content of the written slots, ``(B, kw, D)``; see the class docstring and :meth:`update`."""
        identity = F.embedding(routing.support, self.slot_table)  # (B, kr + kw, D)
        slots = torch.cat((h_read, h_write), dim=1) + identity
        slots_read, slots_write = slots.split((self.read_slots, self.write_slots), dim=1)

        query, token = self.query_token(x).chunk(2, dim=-1)
        key, value = self.key_value(slots_read).chunk(2, dim=-1)
        scores = (self._heads(key) * self._heads(query).unsqueeze(1)).sum(-1, keepdim=True)  # (B, kr, heads, 1)
        weights = self._attention(scores)
        mixed = token + (weights * self._heads(value)).sum(1).flatten(1)  # (B, D)

        gate, write_query = self.control(mixed).chunk(2, dim=-1)
        outputs = self.experts(mixed.unsqueeze(1).expand(-1, self.top_k, -1), routing.experts)  # (B, k, D + 1)
        expert_weights = torch.sigmoid(outputs[..., -1:]).transpose(1, 2)  # (B, 1, k)
        mixture = torch.matmul(expert_weights, outputs[..., :-1])  # (B, 1, D)

        importance = torch.matmul(slots_write, write_query.unsqueeze(-1)) / math.sqrt(self.slot_size)  # (B, kw, 1)
        candidate = torch.tanh(self.core(h_write) + mixture)
        # hardsigmoid(y) = clip(1/2 + y/6, 0, 1); the factor makes gates quick to learn to close.
        gate = F.hardsigmoid(torch.add(importance, gate.unsqueeze(1), alpha=3.0))  # (B, kw, D)
        # The state keeps its precision under autocast.
        return torch.lerp(h_write, candidate.to(h_write.dtype), gate.to(h_write.dtype))

    def update(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """New content of the written slots, and the output; see the class docstring.

        Args:
            x: input of the step, ``(B, input_size)``.
            h_read: old content of the read slots, ``(B, kr, D)``.
            h_write: old content of the written slots, ``(B, kw, D)``.
            routing: what :meth:`route` declared.

        Returns:
            New content of the written slots ``(B, kw, D)`` and the output ``(B, output_size)``.
        """
        h_write_new = self.transition(x, h_read, h_write, routing)
        return h_write_new, self.output(x, torch.cat((h_read, h_write_new), dim=1), routing.support)

    def output(self, x: Tensor, slots: Tensor, support: Tensor) -> Tensor:
        """Output of a step from the slots it touched.

        Args:
            x: input of the step, ``(B, input_size)``.
            slots: old content of the read slots, new content of the written slots, ``(B, kr + kw, D)``.
            support: which slots these are, ``(B, kr + kw)``.

        Returns:
            ``(B, output_size)``.
        """
        return self.readout(x, slots + F.embedding(support, self.slot_table))
