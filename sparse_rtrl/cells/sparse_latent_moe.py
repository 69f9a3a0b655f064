"""The simplest slot cell with experts: content-based reads, and experts that propose content and gate at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_rtrl.cells.expert_bank import ExpertBank
from sparse_rtrl.cells.registry import register_cell
from sparse_rtrl.cells.slot_cell import Routing, SlotCell
from sparse_rtrl.cells.slot_moe import OutputAttention, check_sizes


@register_cell("sparse-latent-moe")
class SparseLatentMoECell(SlotCell):
    r"""Sparse latent mixture-of-experts cell: few parts, few operations per step.

    A slot is seen as its content plus a learned identity, ``s_i = h_i + table_i``. With ``(q, b, u, r)`` a linear map
    of the input,

    .. math::
        z &= u + \sum_{i \in read} \sigma(q \cdot s_i / \sqrt{D}) \, s_i, \qquad
        (m, a) = \sum_{e \in experts} \sigma(r_e) (W_e z + w_e), \\
        h_i &\leftarrow (1 - g_i) \odot h_i + g_i \odot \tanh m, \qquad
        g_i = \sigma(a + \bar a + b \cdot s_i / \sqrt{D}) \qquad \text{for } i \in write.

    Read are the slots with the largest ``q · s_i``, written those with the largest ``b · s_i``, active the experts with
    the largest ``r_e``. Each score is also the soft weight of what it selects, so selection trains.

    Args:
        input_size: size of the input of a step.
        slot_size: numbers per slot ``D``.
        num_slots: number of slots ``S``.
        num_experts: number of experts ``E``.
        top_k: experts active in a step.
        read_slots: slots read in a step.
        write_slots: slots written in a step.
        output_size: size of the output.
        gate_bias: constant added to the write gates; the more negative, the longer an untrained cell remembers.

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
        gate_bias: float = -2.0,
    ) -> None:
        super().__init__(num_slots, slot_size, num_experts)
        check_sizes(
            input_size=input_size,
            num_slots=num_slots,
            num_experts=num_experts,
            top_k=top_k,
            read_slots=read_slots,
            write_slots=write_slots,
            output_size=output_size,
        )
        self.input_size = input_size
        self.output_size = output_size
        self.top_k = top_k
        self.read_slots = read_slots
        self.write_slots = write_slots
        self.gate_bias = gate_bias

        self.slot_table = nn.Parameter(torch.randn(num_slots, slot_size))
        self.control = nn.Linear(input_size, 3 * slot_size + num_experts)
        self.experts = ExpertBank(num_experts, slot_size, 2 * slot_size)
        self.readout = OutputAttention(input_size, slot_size, output_size)

    def extra_repr(self) -> str:
        """Sizes of the cell, for ``print``."""
        return (
            f"num_slots={self.num_slots}, slot_size={self.slot_size}, top_k={self.top_k}, "
            f"read_slots={self.read_slots}, write_slots={self.write_slots}"
        )

    def _control(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read query, write query and token ``(B, D)`` each, and expert logits ``(B, E)``."""
        return self.control(x).split((self.slot_size,) * 3 + (self.num_experts,), dim=-1)

    def route(self, x: Tensor, state: Tensor) -> Routing:
        """Choose slots by their scores and experts by their logits; see the class docstring.

        Args:
            x: input of the step, ``(B, input_size)``.
            state: ``(B, S, D)``.

        Returns:
            Indices of the step.
        """
        read_query, write_query, _, logits = self._control(x)
        queries = torch.stack((read_query, write_query), dim=-1)
        read_scores, write_scores = torch.matmul(state + self.slot_table, queries).unbind(-1)  # (B, S) each
        return Routing(
            read_scores.topk(self.read_slots, dim=1).indices,
            write_scores.topk(self.write_slots, dim=1).indices,
            logits.topk(self.top_k, dim=1).indices,
        )

    def transition(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> Tensor:
        """New content of the written slots, ``(B, kw, D)``; see the class docstring and :meth:`update`."""
        identity = F.embedding(routing.support, self.slot_table)  # (B, kr + kw, D)
        slots = torch.cat((h_read, h_write), dim=1) + identity
        slots_read, slots_write = slots.split((self.read_slots, self.write_slots), dim=1)
        read_query, write_query, token, logits = self._control(x)

        weights = torch.sigmoid(torch.matmul(slots_read, read_query.unsqueeze(-1)) / math.sqrt(self.slot_size))
        mixed = token.unsqueeze(1) + torch.matmul(weights.transpose(1, 2), slots_read)  # (B, 1, D)
        proposals = self.experts(mixed.expand(-1, self.top_k, -1), routing.experts)  # (B, k, 2 D)
        expert_weights = torch.sigmoid(logits.gather(1, routing.experts))
        content, gate = torch.matmul(expert_weights.unsqueeze(1), proposals).chunk(2, dim=-1)  # (B, 1, D) each

        importance = torch.matmul(slots_write, write_query.unsqueeze(-1)) / math.sqrt(self.slot_size)  # (B, kw, 1)
        gate = torch.sigmoid(gate + importance + self.gate_bias)
        # The state keeps its precision under autocast.
        candidate = torch.tanh(content).expand_as(h_write).to(h_write.dtype)
        return torch.lerp(h_write, candidate, gate.to(h_write.dtype))

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
        identity = F.embedding(routing.support, self.slot_table)  # (B, kr + kw, D)
        return h_write_new, self.readout(x, torch.cat((h_read, h_write_new), dim=1) + identity)
