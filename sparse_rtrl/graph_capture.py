"""Capture of a segment's Jacobians from the autograd graph that the user's own code left behind.

The graph between the state that entered the segment and the state that left it is walked once. Where a parameter enters
a known map, the backward pass is asked for the gradient ``delta`` at the output of that node, for all state entries at
once (a batched backward pass, one row per entry of the new state, all streams together), and the node's saved input is
``z``: that is the immediate Jacobian, factored. A parameter that enters the graph in any other way, or whose factors
disagree with an ordinary backward pass, takes the dense path: one backward row per stream and state entry.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from sparse_rtrl.errors import ContractError
from sparse_rtrl.jacobian import Factors, Term
from sparse_rtrl.parameter_uses import Factor, Layout, SegmentGraph, Use, uses_of, without_hooks


class GraphCapture:
    """Captures segments of any differentiable code.

    Args:
        names: names of the parameters that are carried, for messages.
        offsets: their first columns in the influence matrix.
        noted: names of the parameters whose dense path was noted already.
    """

    def __init__(self, names: list[str], offsets: list[int], noted: set[str] | None = None) -> None:
        self.names = names
        self.offsets = offsets
        self.noted: set[str] = set() if noted is None else noted
        self._layouts: dict[Any, dict[int, Layout | None]] = {}

    def segment(
        self,
        end: Tensor,
        entry: Tensor,
        parameters: list[Tensor],
        graph: SegmentGraph,
        cotangents: Tensor | None = None,
    ) -> tuple[Tensor, Factors]:
        """Capture one segment; the graph is kept for the backward pass of the user's loss.

        Args:
            end: state that left the segment, ``(B, H)``, with its graph.
            entry: state that entered it, ``(B, H)``.
            parameters: what is carried, in the order of ``names``.
            graph: from :func:`~sparse_rtrl.parameter_uses.walk`.
            cotangents: combinations of the state's entries to differentiate, ``(n, B, H)``; None for every entry by
                itself, ``n = H``.

        Returns:
            State Jacobian ``(B, n, H)`` and the immediate Jacobians, ``delta (B, n, Σ τ m)``.

        Raises:
            ContractError: if the streams influence each other.
        """
        with torch.no_grad(), without_hooks(parameters):
            return self._segment(end, entry, parameters, graph, cotangents)

    def _segment(
        self, end: Tensor, entry: Tensor, parameters: list[Tensor], graph: SegmentGraph, cotangents: Tensor | None
    ) -> tuple[Tensor, Factors]:
        batch, hidden = end.shape
        if cotangents is None:
            eye = torch.eye(hidden, dtype=end.dtype, device=end.device)
            cotangents = eye.unsqueeze(1).expand(-1, batch, -1)
        uses: list[Use] = []
        dense: list[int] = []
        for number, parameter in enumerate(parameters):
            if id(parameter) not in graph.accumulators:
                continue
            found = uses_of(number, parameter, graph.accumulators[id(parameter)][1], graph, batch)
            if found is None:
                dense.append(number)
            else:
                uses += found
        inputs = [entry, *(GradientEdge(use.node, 0) for use in uses)]
        rows, *found_deltas = _batched_grad(end, inputs, cotangents, graph)
        J = end.new_zeros(cotangents.shape) if rows is None else rows
        deltas = [None if delta is None else delta.to(end.dtype) for delta in found_deltas]
        shapes = [None if d is None else tuple(d.shape) for d in deltas]
        signature = (
            hash(tuple(graph.names)),
            tuple((use.parameter, shape) for use, shape in zip(uses, shapes, strict=True)),
        )
        layouts = self._layouts.get(signature)
        if layouts is None:
            dtypes = {end.dtype, *(delta.dtype for delta in found_deltas if delta is not None)}
            tolerance = min(0.2, 50 * _rounding(dtypes, end.is_cuda, graph) ** 0.75)
            layouts, certain = self._verified_layouts(end, entry, parameters, uses, deltas, J, cotangents, tolerance)
            if certain:
                self._layouts[signature] = layouts
        dense += [number for number, layout in layouts.items() if layout is None]
        self._note_dense(dense, graph)
        pieces: list[tuple[int, Factor]] = []
        for use, delta in zip(uses, deltas, strict=True):
            layout = layouts.get(use.parameter)
            if delta is not None and layout is not None:
                factor = use.build(delta, layout)
                assert factor is not None
                pieces.append((use.parameter, factor))
        pieces += self._dense_pieces(end, parameters, dense, cotangents, graph)
        return J.transpose(0, 1), self._join(pieces, batch, len(cotangents), end)

    def _note_dense(self, numbers: list[int], graph: SegmentGraph) -> None:
        new = [self.names[number] for number in numbers if self.names[number] not in self.noted]
        self.noted.update(new)
        if not new:
            return
        reason = "used in a way whose immediate Jacobian is not captured as factors"
        if graph.compiled:
            reason = "inside a function that torch.compile made, which hides how they are used"
        warnings.warn(f"{', '.join(new)}: {reason}; the dense one is computed instead (exact, slower)", stacklevel=2)

    def _verified_layouts(
        self,
        end: Tensor,
        entry: Tensor,
        parameters: list[Tensor],
        uses: list[Use],
        deltas: list[Tensor | None],
        J: Tensor,
        cotangents: Tensor,
        tolerance: float,
    ) -> tuple[dict[int, Layout | None], bool]:
        """For each parameter the layout whose factors agree with an ordinary backward pass; None if there is none.

        Also whether another segment may rely on it: not where two different layouts agree, or nothing is seen because
        the gradient is zero, as that of a weight which multiplies a state of zeros.
        """
        batch = end.shape[0]
        numbers = sorted({use.parameter for use in uses})
        generator = torch.Generator(device="cpu").manual_seed(0)
        c = torch.randn(batch, len(cotangents), generator=generator, dtype=torch.float64).to(end)
        v = torch.einsum("bn,nbh->bh", c, cotangents)
        wanted = [entry, *(parameters[n] for n in numbers)]
        through_state, *truth = torch.autograd.grad(end, wanted, v, retain_graph=True, allow_unused=True)
        finite = all(bool(torch.isfinite(g).all()) for g in (through_state, *truth) if g is not None)
        if not finite:
            return dict.fromkeys(numbers, "outer"), False  # nothing to compare with; the caller refuses the segment
        self._check_streams(through_state, torch.einsum("bn,nbh->bh", c, J), tolerance)
        certain = batch == 1 or (through_state is not None and bool(through_state.any()))
        scale = max((float(g.abs().max()) for g in truth if g is not None), default=0.0)
        out: dict[int, Layout | None] = {}
        for number, expected in zip(numbers, truth, strict=True):
            agreeing: list[Layout] = []
            mine = [(use, d) for use, d in zip(uses, deltas, strict=True) if use.parameter == number and d is not None]
            size = parameters[number].numel()
            for layout in ("outer", "inner"):
                factors = [use.build(d, layout) for use, d in mine]
                if any(factor is None for factor in factors):
                    continue
                total = end.new_zeros(size)
                for factor in (f for f in factors if f is not None):
                    pulled = torch.einsum("bn,bntm->btm", c, factor.delta)
                    z = factor.z
                    part = (pulled.sum((0, 1)) if z is None else torch.einsum("btm,btj->mj", pulled, z)).flatten()
                    total[factor.column : factor.column + part.numel()] += part
                g = end.new_zeros(size) if expected is None else expected.flatten()
                own = max(float(g.abs().max()), 1e-2 * scale)
                if float((total - g).abs().max()) <= tolerance * own:
                    agreeing.append(layout)
            out[number] = agreeing[0] if agreeing else None
            one_row_each = all(d.dim() == 2 or d.shape[1] == batch for _, d in mine)
            seen = expected is not None and bool(expected.any())
            certain &= seen and (len(agreeing) <= 1 or batch == 1 or one_row_each)
        return out, certain

    def _check_streams(self, truth: Tensor | None, found: Tensor, tolerance: float) -> None:
        """Refuse a segment in which one stream's new state depends on another's old one."""
        error = (found if truth is None else found - truth).abs().max()
        if float(error) > tolerance * max(float(found.abs().max()), 1e-6):
            raise ContractError(
                [
                    "the streams of the batch influence each other through the state, so the gradient of"
                    f" {', '.join(self.names)} cannot be carried stream by stream: put batch norm into eval mode or"
                    " replace it by a norm that works within a stream, and keep other batch statistics off the state"
                ]
            )

    def _dense_pieces(
        self, end: Tensor, parameters: list[Tensor], numbers: list[int], cotangents: Tensor, graph: SegmentGraph
    ) -> list[tuple[int, Factor]]:
        """Dense immediate Jacobians by one backward row per stream and cotangent."""
        if not numbers:
            return []
        count, batch, hidden = cotangents.shape
        single = torch.eye(batch, dtype=end.dtype, device=end.device).unsqueeze(-1)  # (stream, B, 1)
        rows = (single.unsqueeze(1) * cotangents).view(batch * count, batch, hidden)
        grads = _batched_grad(end, [parameters[number] for number in numbers], rows, graph)
        return [
            (number, Factor(0, grad.reshape(batch, count, 1, -1).to(end.dtype), None))
            for number, grad in zip(numbers, grads, strict=True)
            if grad is not None
        ]

    def _join(self, pieces: list[tuple[int, Factor]], batch: int, rows: int, like: Tensor) -> Factors:
        terms, start = [], 0
        for number, factor in pieces:
            tau, m = factor.delta.shape[-2:]
            z = None if factor.z is None else factor.z.to(like.dtype).contiguous()
            terms.append(Term(self.offsets[number] + factor.column, start, tau, m, z))
            start += tau * m
        if not terms:
            return Factors(like.new_zeros(batch, rows, 0), ())
        return Factors(torch.cat([factor.delta.flatten(-2) for _, factor in pieces], dim=-1), tuple(terms))


def _rounding(dtypes: set[torch.dtype], cuda: bool, graph: SegmentGraph) -> float:
    """Rounding unit of the arithmetic of a segment: that of its coarsest dtype, or of the float32 products allowed."""
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    if torch.float32 not in dtypes:
        return coarsest
    backends: Any = torch.backends  # torch has no types for what these modules hold
    products = backends.cuda.matmul if cuda else backends.mkldnn.matmul
    convolutions = backends.cudnn.conv if cuda else backends.mkldnn.conv
    used = [products, *([convolutions] if "ConvolutionBackward0" in graph.names else [])]
    settings = [part.fp32_precision for part in (*used, backends)]
    return max(coarsest, *({"tf32": 2.0**-10, "bf16": 2.0**-7}.get(setting, 0.0) for setting in settings))


def _batched_grad(end: Tensor, inputs: list[Any], cotangents: Tensor, graph: SegmentGraph) -> list[Tensor | None]:
    """Gradients for a batch of cotangents ``(n, *end.shape)``, stacked; row by row where torch cannot batch them."""
    if not graph.compiled:
        try:
            return list(
                torch.autograd.grad(
                    end, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
                )
            )
        except RuntimeError as error:
            if "second time" in str(error) or "modified by an inplace operation" in str(error):
                raise
    rows = [torch.autograd.grad(end, inputs, c, retain_graph=True, allow_unused=True) for c in cotangents]
    return [_stacked(column) for column in zip(*rows, strict=True)]


def _stacked(rows: tuple[Tensor | None, ...]) -> Tensor | None:
    """Rows on top of each other, with zeros where there is none; None if there is none at all."""
    like = next((row for row in rows if row is not None), None)
    return None if like is None else torch.stack([torch.zeros_like(like) if row is None else row for row in rows])
