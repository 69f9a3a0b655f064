"""RFLO: the influence that a parameter's own unit remembers by itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_rtrl.capture.parameter_uses import SegmentGraph
from sparse_rtrl.learners.methods.pattern import PatternPast

MIXING = (
    "Addbmm",
    "Addmm",
    "Addmv",
    "Addr",
    "Baddbmm",
    "Bmm",
    "Convolution",
    "Dot",
    "Linear",
    "Mm",
    "Mv",
    "ScaledDotProduct",
)
"""Beginnings of the names of nodes that mix units of the state by products."""

OPAQUE = ("Rnn", "Trilinear")
"""Parts of the names of torch's own nodes that hide products among other things."""


class RFLO(PatternPast):
    """Random-feedback online learning without its random feedback: ``P <- M ⊙ (L P + F)`` (Murray 2019, eq. 5).

    Murray's cell is ``h' = (1 - 1/τ) h + φ(W h + U x) / τ``, and he keeps the leak ``L = (1 - 1/τ) I`` of the state
    Jacobian. Here, for any module, ``L`` is the Jacobian along those paths of the segment's graph that pass through no
    product of matrices and no convolution: the leak of that cell, the update gate of a GRU, the forget gate of an LSTM
    (where it is the eligibility trace of e-prop, Bellec et al. 2020), zero for an Elman cell. The loss goes back to the
    state through the true readout weights, not through random ones. ``M`` is the pattern of the immediate Jacobian, see
    :class:`PatternPast`; within a segment the gradient is exact, so that the original is a segment of one step.

    Keeps ``B q |θ|`` numbers and costs ``q^2 |θ|`` multiply-adds per segment and stream, and a second backward pass
    through the element-wise part at capture. Modules whose products are hidden (compiled functions, fused recurrent
    layers, custom autograd functions) are refused.
    """

    name: ClassVar[str] = "rflo"

    def _kept_part(self, J: Tensor, end: Tensor, entry: Tensor, graph: SegmentGraph) -> Tensor:
        # Torch numbers its own nodes; those of custom and compiled functions have no number.
        hidden = {n for n in graph.names if not n[-1].isdigit() or any(part in n for part in OPAQUE)}
        hidden.discard("torch::autograd::AccumulateGrad")
        if hidden:
            raise RuntimeError(
                f"method 'rflo' must see the products of matrices in the graph, but {sorted(hidden)} hide them: write"
                " the module with plain operations, or use another method"
            )
        return elementwise_jacobian(end, entry, graph)


def elementwise_jacobian(end: Tensor, entry: Tensor, graph: SegmentGraph) -> Tensor:
    """``d end / d entry`` along the paths that pass no product of matrices, ``(B, H, H)``.

    Args:
        end: state that left the segment, ``(B, H)``.
        entry: state that entered it, ``(B, H)``.
        graph: the graph between them.
    """
    batch, hidden = end.shape

    def cut(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else torch.zeros_like(g) for g in gradients)

    handles: list[Any] = [
        node.register_prehook(cut)
        for node, name in zip(graph.nodes, graph.names, strict=True)
        if name.startswith(MIXING)
    ]
    try:
        eye = torch.eye(hidden, dtype=end.dtype, device=end.device).unsqueeze(1).expand(-1, batch, -1)
        (rows,) = torch.autograd.grad(end, entry, eye, retain_graph=True, allow_unused=True, is_grads_batched=True)
    finally:
        for handle in handles:
            handle.remove()
    return end.new_zeros(batch, hidden, hidden) if rows is None else rows.transpose(0, 1)
