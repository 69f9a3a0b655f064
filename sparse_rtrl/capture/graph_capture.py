"""Capture of a segment's Jacobians from the autograd graph that the user's own code left behind.

The graph between the state that entered the segment and the state that left it is walked once. Where a parameter enters
a known map, the backward pass is asked for the gradient ``delta`` at the output of that node, for all state entries at
once (a batched backward pass, one row per entry of the new state, all streams together), and the node's saved input is
``z``: that is the immediate Jacobian, factored. A parameter that enters the graph in any other way, or whose factors
disagree with an ordinary backward pass, takes the dense path: one backward row per stream and state entry.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from sparse_rtrl.capture.parameter_uses import (
    STREAM_ORDERS,
    Factor,
    SegmentGraph,
    StreamOrder,
    Use,
    uses_of,
    without_hooks,
    without_reducers,
)
from sparse_rtrl.capture.segment import Factors, Term
from sparse_rtrl.capture.verify import PROBE_SCALE, SQUARING
from sparse_rtrl.errors import ContractError


class GraphCapture:
    """Captures segments of any differentiable code.

    Beside the rows of the Jacobian every backward pass takes one more, the *probe*: a random combination of all rows,
    with different coefficients for every stream, and scaled. It finds faults that any segment may bring: streams that
    influence each other, rows that stand in the place of another stream, and backward passes that are not linear. A new
    kind of segment is also compared with an ordinary backward pass.

    Args:
        names: names of the parameters that are carried, for messages.
        offsets: their first columns in the influence matrix.
        noted: names of the parameters whose dense path was noted already.
        dense: whether every parameter takes the dense path.
    """

    def __init__(
        self, names: list[str], offsets: list[int], noted: set[str] | None = None, dense: bool = False
    ) -> None:
        self.names = names
        self.offsets = offsets
        self.noted: set[str] = set() if noted is None else noted
        self.dense = dense
        self._known: dict[Any, dict[int, list[StreamOrder]]] = {}
        self._coefficients: Tensor | None = None

    def segment(
        self,
        end: Tensor,
        entry: Tensor | None,
        parameters: list[Tensor],
        graph: SegmentGraph,
        cotangents: Tensor | None = None,
    ) -> tuple[Tensor, Factors]:
        """Capture one segment; the graph is kept for the backward pass of the user's loss.

        Args:
            end: state that left the segment, ``(B, H)``, with its graph.
            entry: state that entered it, ``(B, H)``; None for a segment from nowhere, whose state Jacobian is zero.
            parameters: what is carried, in the order of ``names``; a complex one is a pair of real numbers per element.
            graph: from :func:`~sparse_rtrl.capture.parameter_uses.walk`.
            cotangents: combinations of the state's entries to differentiate, ``(n, B, H)``; None for every entry by
                itself, ``n = H``.

        Returns:
            State Jacobian ``(B, n, H)`` and the immediate Jacobians, ``delta (B, n, Σ τ m)``.

        Raises:
            ContractError: if the streams influence each other, or the backward pass is not linear.
        """
        with torch.no_grad(), without_hooks(parameters), without_reducers(graph):
            return self._segment(end, entry, parameters, graph, cotangents)

    def _segment(
        self,
        end: Tensor,
        entry: Tensor | None,
        parameters: list[Tensor],
        graph: SegmentGraph,
        cotangents: Tensor | None,
    ) -> tuple[Tensor, Factors]:
        batch, hidden = end.shape
        if cotangents is None:
            eye = torch.eye(hidden, dtype=end.dtype, device=end.device)
            cotangents = eye.unsqueeze(1).expand(-1, batch, -1)
        count = len(cotangents)
        uses, dense = self._uses(parameters, graph, batch)
        inputs = [*([] if entry is None else [entry]), *(GradientEdge(use.node, 0) for use in uses)]
        coefficients = self._coefficients_for(batch, count, end)
        probe = torch.einsum("bn,nbh->bh", coefficients, cotangents)
        found = _batched_grad(end, inputs, torch.cat((cotangents, probe.unsqueeze(0))), graph)
        if _overflows(found):  # a large probe overflows in half precision
            coefficients, probe = coefficients / PROBE_SCALE, probe / PROBE_SCALE
            found = _batched_grad(end, inputs, torch.cat((cotangents, probe.unsqueeze(0))), graph)
        tolerance = Tolerance(end, found, graph)
        J = end.new_zeros(batch, count, hidden)
        if entry is not None and found[0] is not None:
            through = found[0].transpose(0, 1)
            J = through[:, :count]
            if not tolerance.explains(_disagreement(through, coefficients, tolerance)):
                _check_linear(end, inputs, probe, found, tolerance)
                _refuse_coupled(graph)
        by_use = zip(uses, found[len(inputs) - len(uses) :], strict=True)
        of_uses = [(use, g) for use, g in by_use if g is not None and g.numel()]
        # A complex output of a map has no real factors.
        in_complex = {use.parameter for use, g in of_uses if g.is_complex()}
        rows_of = [UseRows(use, g.to(end.dtype)) for use, g in of_uses if use.parameter not in in_complex]
        verified = self._verified_orders(end, entry, parameters, rows_of, cotangents, graph, tolerance)
        orders = {number: known[0] for number, known in verified.items() if known}
        factors, terms = self._join(self._pieces(rows_of, orders), batch, count + 1, end)
        if not tolerance.explains(_disagreement(factors, coefficients, tolerance)):
            _check_linear(end, inputs, probe, found, tolerance)
            orders = self._placed(rows_of, verified, coefficients, tolerance)
            factors, terms = self._join(self._pieces(rows_of, orders), batch, count + 1, end)
        dense += [*sorted(in_complex), *(number for number in verified if number not in orders)]
        self._note_dense(dense, graph)
        factors = factors[:, :count].contiguous()
        if dense:
            pieces = self._dense_pieces(end, parameters, dense, cotangents, graph)
            more, dense_terms = self._join(pieces, batch, count, end, factors.shape[2])
            factors, terms = torch.cat((factors, more), dim=2), terms + dense_terms
        return J, Factors(factors, terms)

    def _coefficients_for(self, batch: int, count: int, like: Tensor) -> Tensor:
        """Coefficients of the cotangents in the probe, ``(B, n)``: different ones for every stream."""
        kept = self._coefficients
        if kept is None or kept.shape != (batch, count) or kept.dtype != like.dtype or kept.device != like.device:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(batch, count, device="cpu", generator=generator, dtype=torch.float64)
            kept = self._coefficients = PROBE_SCALE * drawn.to(like)
        return kept

    def _pieces(self, rows_of: list[UseRows], orders: dict[int, StreamOrder]) -> list[tuple[int, Factor]]:
        """Factors of the parameters that have an order."""
        out = []
        for use, delta in rows_of:
            if use.parameter in orders:
                factor = use.build(delta, orders[use.parameter])
                assert factor is not None
                out.append((use.parameter, factor))
        return out

    def _placed(
        self, rows_of: list[UseRows], verified: dict[int, list[StreamOrder]], coefficients: Tensor, tolerance: Tolerance
    ) -> dict[int, StreamOrder]:
        """For each parameter an order that gives every stream its own rows; parameters without one are left out."""
        out: dict[int, StreamOrder] = {}
        for number, orders in verified.items():
            mine = [rows for rows in rows_of if rows.use.parameter == number]
            for order in orders:
                factors = [factor for _, factor in self._pieces(mine, {number: order})]
                wrong = [_disagreement(factor.delta.flatten(2), coefficients, tolerance) for factor in factors]
                if all(tolerance.explains(error) for error in wrong):
                    out[number] = order
                    orders.remove(order)
                    orders.insert(0, order)  # tried first the next time
                    break
        return out

    def _uses(self, parameters: list[Tensor], graph: SegmentGraph, batch: int) -> tuple[list[Use], list[int]]:
        """Known uses of the parameters that reach the state, and the numbers of those that have another one."""
        uses: list[Use] = []
        dense: list[int] = []
        for number, parameter in enumerate(parameters):
            if id(parameter) not in graph.accumulators:
                continue
            known = None
            if not self.dense and not parameter.is_complex():
                known = uses_of(number, parameter, graph.accumulators[id(parameter)][1], graph, batch)
            if known is None:
                dense.append(number)
            else:
                uses += known
        return uses, dense

    def _verified_orders(
        self,
        end: Tensor,
        entry: Tensor | None,
        parameters: list[Tensor],
        rows_of: list[UseRows],
        cotangents: Tensor,
        graph: SegmentGraph,
        tolerance: Tolerance,
    ) -> dict[int, list[StreamOrder]]:
        """For each parameter the orders whose factors agreed with an ordinary backward pass for this kind of segment.

        That an order is right is remembered for segments of the same operations and shapes. That the rows belong to
        the streams is not: the probe shows it every time.
        """
        shapes = tuple((rows.use.parameter, tuple(rows.delta.shape)) for rows in rows_of)
        signature = (tuple(graph.names), shapes, entry is None)
        verified = self._known.get(signature)
        if verified is None:
            verified, certain = self._verify_orders(end, entry, parameters, rows_of, cotangents, graph, tolerance)
            if certain:
                self._known[signature] = verified
        return verified

    def _note_dense(self, numbers: list[int], graph: SegmentGraph) -> None:
        new = [] if self.dense else [self.names[number] for number in numbers if self.names[number] not in self.noted]
        self.noted.update(new)
        if not new:
            return
        reason = "used in a way whose immediate Jacobian is not captured as factors"
        if graph.compiled:
            reason = "inside a function that torch.compile made, which hides how they are used"
        warnings.warn(f"{', '.join(new)}: {reason}; the dense one is computed instead (exact, slower)", stacklevel=2)

    def _verify_orders(
        self,
        end: Tensor,
        entry: Tensor | None,
        parameters: list[Tensor],
        rows_of: list[UseRows],
        cotangents: Tensor,
        graph: SegmentGraph,
        tolerance: Tolerance,
    ) -> tuple[dict[int, list[StreamOrder]], bool]:
        """For each parameter the orders whose factors agree with an ordinary backward pass of half of the streams.

        Also whether later segments may rely on the result. They may not if a gradient was zero, as that of a weight
        that multiplies a state of zeros: the comparison then shows nothing.

        Raises:
            ContractError: if the states of the other half get any gradient at all.
        """
        numbers = sorted({rows.use.parameter for rows in rows_of})
        wanted = [*([] if entry is None else [entry]), *(parameters[n] for n in numbers)]
        if not wanted:
            return {}, False
        coefficients, silent = _half_silent(end.shape[0], len(cotangents), end)
        v = torch.einsum("bn,nbh->bh", coefficients, cotangents)
        truth = list(torch.autograd.grad(end, wanted, v, retain_graph=True, allow_unused=True))
        back = None if entry is None else truth.pop(0)
        if not all(bool(torch.isfinite(g).all()) for g in (back, *truth) if g is not None):
            return {n: ["outer"] for n in numbers}, False  # nothing to compare with; the caller refuses the segment
        if back is not None and bool(back[silent].any()):
            _refuse_coupled(graph)
        scale = max((float(g.abs().max()) for g in truth if g is not None), default=0.0)
        out: dict[int, list[StreamOrder]] = {}
        for number, expected in zip(numbers, truth, strict=True):
            mine = [rows for rows in rows_of if rows.use.parameter == number]
            g = end.new_zeros(parameters[number].numel()) if expected is None else expected.flatten().to(end.dtype)
            size = max(float(g.abs().max()), 1e-2 * scale)
            found = {order: _gradient(mine, order, coefficients, g) for order in STREAM_ORDERS}
            errors = {order: float((of - g).abs().max()) for order, of in found.items() if of is not None}
            out[number] = [order for order, e in errors.items() if tolerance.explains(e / size if size else 0.0)]
        certain = all(expected is not None and bool(expected.any()) for expected in truth)
        return out, certain

    def _dense_pieces(
        self, end: Tensor, parameters: list[Tensor], numbers: list[int], cotangents: Tensor, graph: SegmentGraph
    ) -> list[tuple[int, Factor]]:
        """Dense immediate Jacobians by one backward row per stream and cotangent."""
        if not numbers:
            return []
        count, batch, hidden = cotangents.shape
        single = torch.eye(batch, dtype=end.dtype, device=end.device).unsqueeze(-1)  # (stream, B, 1)
        rows = (single.unsqueeze(1) * cotangents).view(batch * count, batch, hidden)
        weights = self._coefficients_for(batch, count, end).flatten()
        probe = torch.einsum("n,nbh->bh", weights, rows)
        inputs = [parameters[number] for number in numbers]
        grads = _batched_grad(end, inputs, torch.cat((rows, probe.unsqueeze(0))), graph)
        if _overflows(grads):
            weights, probe = weights / PROBE_SCALE, probe / PROBE_SCALE
            grads = _batched_grad(end, inputs, torch.cat((rows, probe.unsqueeze(0))), graph)
        tolerance = Tolerance(end, grads, graph)
        for grad in grads:
            if grad is not None and grad.numel():
                real = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
                flat = real.reshape(len(real), -1).to(end.dtype)
                if not tolerance.explains(_disagreement(flat.unsqueeze(0), weights.unsqueeze(0), tolerance)):
                    _check_linear(end, inputs, probe, grads, tolerance)
        grads = [None if grad is None else grad[:-1] for grad in grads]
        pairs = [torch.view_as_real(g.resolve_conj()) if g is not None and g.is_complex() else g for g in grads]
        return [
            (number, Factor(0, grad.reshape(batch, count, 1, -1).to(end.dtype), None))
            for number, grad in zip(numbers, pairs, strict=True)
            if grad is not None
        ]

    def _join(
        self, pieces: list[tuple[int, Factor]], batch: int, rows: int, like: Tensor, start: int = 0
    ) -> tuple[Tensor, tuple[Term, ...]]:
        """Deltas of factors side by side, ``(B, rows, Σ τ m)``, and how to read them, counted from ``start``."""
        terms = []
        for number, factor in pieces:
            tau, m = factor.delta.shape[-2:]
            # A copy: the memory may belong to the caller, who may reuse it before the segment is committed.
            z = None if factor.z is None else factor.z.to(like.dtype).clone(memory_format=torch.contiguous_format)
            terms.append(Term(self.offsets[number] + factor.column, start, tau, m, z))
            start += tau * m
        if not terms:
            return like.new_zeros(batch, rows, 0), ()
        return torch.cat([factor.delta.flatten(-2) for _, factor in pieces], dim=-1), tuple(terms)


class UseRows(NamedTuple):
    """What the backward pass gave at the output of a known map."""

    use: Use
    delta: Tensor
    """One row per cotangent, and one of the probe, ``(n + 1, *output shape)``."""


class Tolerance:
    """How far two results of a segment's arithmetic may be apart by rounding.

    Args:
        end: state that left the segment.
        found: gradients of the cotangents and the probe, ``(n + 1, ...)`` each.
        graph: the graph; its coarsest dtype is looked for only where a finer one does not explain a difference.
    """

    def __init__(self, end: Tensor, found: list[Tensor | None], graph: SegmentGraph) -> None:
        probed = [g[-1] for g in found if g is not None and g.numel()]
        self.smallest = end.new_zeros(())
        """A hundredth of the probe's largest value: smaller ones may be rounding errors of larger ones."""
        if probed:
            self.smallest = 1e-2 * torch.stack([g.abs().amax().to(end.dtype) for g in probed]).amax()
        self._dtypes = {end.dtype, *(g.dtype for g in probed)}
        self._cuda = end.is_cuda
        self._graph = graph
        self._whole_graph = False
        self._relative = self._of_dtypes()

    def _of_dtypes(self) -> float:
        rounding = _rounding(self._dtypes, self._cuda, self._graph)
        if self._whole_graph and self._graph.has(SQUARING):
            return min(0.2, 50 * max(rounding**0.75, abs(PROBE_SCALE) * rounding))
        return min(0.2, 50 * rounding**0.75)

    def explains(self, error: float) -> bool:
        """Whether rounding explains a relative error; what is not finite is refused elsewhere."""
        if error <= self._relative or not math.isfinite(error):
            return True
        if not self._whole_graph:
            self._whole_graph = True
            self._dtypes |= self._graph.floating_dtypes()
            self._relative = self._of_dtypes()
        return error <= self._relative


def _overflows(found: list[Tensor | None]) -> bool:
    """Whether gradients of the probe, the last row, are not finite where those of the other rows are."""
    given = [g for g in found if g is not None and g.dtype not in (torch.float32, torch.float64)]
    return any(bool(torch.isfinite(g[:-1].sum()) & ~torch.isfinite(g[-1].sum())) for g in given)


def _half_silent(batch: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Random coefficients of the cotangents, ``(B, n)``, zero for half of the streams; and those streams."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    coefficients = torch.randn(batch, count, device="cpu", generator=generator, dtype=torch.float64)
    silent = torch.randperm(batch, device="cpu", generator=generator)[: batch // 2]
    coefficients[silent] = 0
    return coefficients.to(like), silent.to(like.device)


def _gradient(rows_of: list[UseRows], order: StreamOrder, coefficients: Tensor, like: Tensor) -> Tensor | None:
    """The gradient of one parameter by the factors of its uses, flat; None if the order does not fit their shapes.

    Args:
        rows_of: its uses.
        order: of the rows.
        coefficients: of the cotangents, ``(B, n)``.
        like: a tensor of the gradient's shape, ``(numel,)``.
    """
    total = torch.zeros_like(like)
    for use, delta in rows_of:
        factor = use.build(delta[: coefficients.shape[1]], order)
        if factor is None:
            return None
        pulled, z = torch.einsum("bn,bntm->btm", coefficients, factor.delta), factor.z
        part = (pulled.sum((0, 1)) if z is None else torch.einsum("btm,btj->mj", pulled, z)).flatten()
        total[factor.column : factor.column + part.numel()] += part
    return total


def _disagreement(rows: Tensor, coefficients: Tensor, tolerance: Tolerance) -> float:
    """Largest relative difference of the probe, the last of ``rows (B, n + 1, k)``, from the others combined."""
    if not rows.numel():
        return 0.0
    combined = torch.bmm(coefficients.unsqueeze(1), rows[:, :-1]).squeeze(1)
    probed = rows[:, -1]
    sizes = torch.maximum(torch.maximum(combined.abs(), probed.abs()), tolerance.smallest)
    return float(((combined - probed).abs() / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).amax())


def _check_linear(
    end: Tensor, inputs: list[Any], probe: Tensor, found: list[Tensor | None], tolerance: Tolerance
) -> None:
    """Refuse a segment whose backward pass does not scale with what is sent back.

    Args:
        end: state that left the segment.
        inputs: what was differentiated by.
        probe: the last of the cotangents, ``(B, H)``.
        found: gradients of the cotangents, ``(n + 1, ...)`` each.
        tolerance: of the segment.

    Raises:
        ContractError: with the likely reasons.
    """
    smaller = torch.autograd.grad(end, inputs, probe / PROBE_SCALE, retain_graph=True, allow_unused=True)
    for small, rows in zip(smaller, found, strict=True):
        if small is None or rows is None or not rows.numel():
            continue
        error = (PROBE_SCALE * small - rows[-1]).abs().amax()
        size = torch.maximum(rows[-1].abs().amax(), PROBE_SCALE * small.abs().amax())
        if not tolerance.explains(float(error / torch.maximum(size, tolerance.smallest))):
            raise ContractError(
                [
                    "the backward pass of the segment is not linear: a hook on a tensor, or a custom backward pass,"
                    " clips, normalises or branches on gradients. The influence cannot be carried through it: remove"
                    " it, and clip the parameters' gradients after backward instead"
                ]
            )


def _refuse_coupled(graph: SegmentGraph) -> NoReturn:
    """Refuse a segment in which one stream's new state depends on another's old one.

    Raises:
        ContractError: with the likely reasons.
    """
    reasons = []
    if graph.has(REORDERING):
        reasons.append(
            "rows are reordered or gathered across the batch (as h[order] in beam search), so that a stream goes on in"
            " the order of another: put the rows back before carry(h), or reset the streams that were replaced"
        )
    if graph.has(STATISTICS):
        reasons.append("a statistic or a limit over the batch (sum, mean, sort, cumsum, softmax over dimension 0)")
    reasons.append("an adaptive solver that chooses one step size for the whole batch")
    reasons.append(
        "dimension batch_dim of the state is not the streams (the state of nn.LSTM needs batch_dim=1; nodes of a graph"
        " or particles that interact are one stream: give the state a dimension of size one in front)"
    )
    raise ContractError(
        ["the streams of the batch influence each other through the state. Likely reasons: " + "; ".join(reasons)]
    )


REORDERING = ("Index", "Gather", "Roll", "Flip", "Take", "Scatter", "Sort")
"""Beginnings of the names of nodes that can move rows."""
STATISTICS = ("Sum", "Mean", "Cumsum", "Var", "Std", "Softmax", "LogSoftmax", "Max", "Amax", "Norm", "NativeBatchNorm")
"""Beginnings of the names of nodes that can join rows."""


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
    if not inputs:
        return []
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
