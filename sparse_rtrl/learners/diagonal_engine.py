"""Capture, checks and influence of one diagonal cell, with steps that enter the past through their graph."""

from __future__ import annotations

import cmath
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparse_rtrl.capture.diagonal_structure import Layout, check_rows, differs, find_layouts
from sparse_rtrl.capture.parameter_uses import GraphNode, walk, without_hooks
from sparse_rtrl.capture.verify import OTHER_STREAMS, STATE, Verifier, tolerance_of
from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Mapped, Projection, State
from sparse_rtrl.errors import ContractError, NonFiniteError
from sparse_rtrl.influence.diagonal import DiagonalInfluence, RecordedSteps, recorded_steps
from sparse_rtrl.influence.estimate import available_bytes
from sparse_rtrl.influence.sparse import check_finite
from sparse_rtrl.learners.engine import checked_mask, describe, refusals
from sparse_rtrl.learners.entry import EnterSegment, SegmentEntry, graph_is_kept
from sparse_rtrl.ops import dispatch
from sparse_rtrl.ops.precision import full_precision

_INHERITED = ("initial_state", "rows", "projected", "states", "outputs", "next_state")
_REASON = (
    "Likely step couples rows of the batch or entries of the state, branches on them, or differentiates otherwise than"
    " it computes; check_cell(cell, x, h) looks closer. A cell that is not diagonal is carried by Carry as a part of"
    " another module"
)


class _Entry(SegmentEntry):
    """The entry of a segment, which gives no gradient while the segment is verified."""

    verifying = False

    def gradients(self, u: Tensor) -> Sequence[Tensor | None]:
        """See :meth:`SegmentEntry.gradients`."""
        return [None] * self.tensors if self.verifying else super().gradients(u)

    def __init__(self, engine: DiagonalEngine, tensors: int) -> None:
        super().__init__(engine)
        self.tensors = tensors


class DiagonalEngine:
    """Runs a diagonal cell in segments and keeps the influence of its parameters.

    Args:
        cell: the cell.
        batch_size: streams ``B``.
        backend: what computes, see :func:`sparse_rtrl.ops.dispatch.select`.

    Raises:
        ContractError: if the cell breaks its contract.
        MemoryError: if the influence does not fit into memory, with the numbers.
    """

    def __init__(self, cell: DiagonalCell, batch_size: int, backend: dispatch.Backend = "auto") -> None:
        if not isinstance(cell, DiagonalCell):
            raise TypeError(f"cell must be a DiagonalCell, got {type(cell).__name__}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        lazy = [name for name, p in cell.named_parameters() if is_lazy(p)]
        if lazy:
            raise ValueError(f"parameters of cell must have shapes, but {lazy} are lazy: run the cell once before")
        refused = [
            f"{name or type(module).__name__} ({type(module).__name__}) {why}"
            for name, module in cell.named_modules()
            for why in refusals(module)
        ]
        refused += [
            f"{type(cell).__name__} overrides {name}, which a learner does not call; override project, step and output"
            for name in ("forward", "unroll")
            if getattr(type(cell), name) is not getattr(DiagonalCell, name)
        ]
        refused += [
            f"{type(cell).__name__} overrides {name}, which a learner relies on; override project, step, output and"
            " initial_entries"
            for name in _INHERITED
            if getattr(type(cell), name) is not getattr(DiagonalCell, name)
        ]
        with torch.enable_grad():
            initial = cell.initial_entries(batch_size)
        refused += _initial_refusals(cell, initial, batch_size)
        if refused:
            raise ContractError(refused)
        self.cell = cell
        self.batch_size = batch_size
        self.steps = 0
        like = cell.zero_rows(1)
        self.dtype, self.device = like.dtype, like.device
        self._parameters = [
            (f"{prefix}.{attribute}" if prefix else attribute, module, attribute, _kind(p))
            for prefix, module in cell.named_modules()
            for attribute, p in module._parameters.items()
            if p is not None
        ]
        self._layouts = find_layouts(cell)
        check_rows(cell, batch_size)
        with torch.enable_grad():
            projections, _ = cell.projected(like)
        self._columns = [projection.columns for projection in projections]
        self._parts = [[(t.shape, t.is_complex()) for t in projection.tensors] for projection in projections]
        kept = [
            layout if any(tensor.requires_grad for tensor in projection.tensors) else None
            for layout, projection in zip(self._layouts, projections, strict=True)
        ]
        if not any(kept) and not initial.requires_grad:
            raise ValueError("cell has no trainable parameter that reaches the state: there is no influence to carry")
        self.check_memory(kept, initial.requires_grad)
        self.influence = DiagonalInfluence(cell, kept, self._columns, batch_size, backend)
        if initial.requires_grad:
            self.influence.add_initial()

    def check_memory(self, layouts: list[Layout | None], initial: bool) -> None:
        """Refuse influence that cannot fit into the memory of the device.

        Raises:
            MemoryError: with the numbers.
        """
        item = self.cell.zero_entries(0).element_size()
        numbers = [
            layout.rows[0] * layout.rows[1] * count
            for layout, count in zip(layouts, self._columns, strict=True)
            if layout is not None
        ]
        if initial:
            numbers.append(self.cell.hidden_size)
        needed = item * self.batch_size * sum(numbers)
        available = available_bytes(self.device)
        if needed > available:
            raise MemoryError(
                f"the influence needs {needed / 2**20:.1f} MiB: itemsize {item} * batch_size {self.batch_size} *"
                f" {sum(numbers)} numbers (per projection {numbers}); {available / 2**20:.1f} MiB are available on"
                f" {self.device}. Use fewer streams or a smaller state"
            )

    def run(
        self, xs: Tensor, state: State, fresh: Tensor | None = None, verifier: Verifier | None = None
    ) -> tuple[Tensor, State]:
        """Run some steps as one segment whose backward pass continues through the influence.

        Args:
            xs: inputs ``(n, B, input_size)``; what is kept of the past takes them as given, even if they have a graph.
            state: the state that enters, ``(B, *state_shape)``, detached.
            fresh: streams ``(B,)`` bool that take their first step, see :meth:`entering`.
            verifier: says whether the segment is compared with an ordinary backward pass.

        Returns:
            Outputs ``(n, B, ...)`` and the new state, detached.

        Raises:
            RuntimeError: if a parameter changed its shape, dtype or device.
            NonFiniteError: if the new state is not finite, or a derivative of an earlier step that is committed now;
                nothing is changed then.
            ContractError: if the cell breaks its contract in this segment; nothing is changed then.
        """
        self.check_parameters()
        if xs.dtype != self.dtype:
            raise ValueError(f"x must be {self.dtype}, as the parameters of the cell are, got {xs.dtype}")
        cell, steps = self.cell, xs.shape[0]
        state = self.entering(state, fresh)
        entries = state if isinstance(state, Tensor) else state[0]
        rows = cell.rows(xs, state)
        projections, values = cell.projected(rows)
        if not rows.requires_grad:
            check_inputs(projections)
        for name in self.admit(projections):
            warnings.warn(f"{name}: trainable from now on; its influence starts at zero", stacklevel=4)
        tensors = self._tensors(projections)
        entry = _Entry(self, len(tensors))
        states = cell.states(EnterSegment.apply(entry, entries, *tensors), values, steps)
        outputs = cell.outputs(rows, states, values)
        self._check_new_state(states)
        recorded = recorded_steps(projections, values, states, self.steps)
        if verifier is not None and verifier.due():
            entry.verifying = True
            try:
                self._check_weights(projections)
                self.verify(verifier, [recorded], projections, states[0], states[-1])
            finally:
                entry.verifying = False
        if self.influence.is_full:
            self.influence.commit()
        if fresh is not None:
            self.influence.begin(fresh)
        entry.settle()
        self.influence.record([recorded])
        self.steps += steps
        new = cell.next_state(xs.detach(), states)
        return outputs, new.detach() if isinstance(new, Tensor) else (new[0].detach(), new[1])

    def entering(self, state: State, fresh: Tensor | None) -> State:
        """State ``(B, *state_shape)`` that enters next: for fresh streams the initial one, by the parameters of now.

        Args:
            state: the last state, ``(B, *state_shape)``.
            fresh: streams ``(B,)`` bool that were started and have taken no step yet; None if there are none.
        """
        if fresh is None:
            return state
        with torch.no_grad():
            initial = self.cell.initial_state(self.batch_size)

        def entered(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(fresh.view(-1, *[1] * (new.dim() - 1)), new, old)

        if isinstance(initial, Tensor) or isinstance(state, Tensor):
            return entered(initial, state)  # type: ignore[arg-type]
        return entered(initial[0], state[0]), entered(initial[1], state[1])

    def initial_entries(self) -> Tensor | None:
        """The initial entries ``(B, *state_shape)`` with their graph; None if they are not and were never trained."""
        if getattr(self.cell.initial_entries, "__func__", None) is DiagonalCell.initial_entries:
            return None
        with torch.enable_grad():
            initial = self.cell.initial_entries(self.batch_size)
        return initial if initial.requires_grad or self.influence.initial is not None else None

    def _tensors(self, projections: tuple[Projection, ...]) -> list[Tensor]:
        """The tensors whose influence is carried: those of projections, and trained initial entries."""
        tensors = [tensor for projection in projections for tensor in projection.tensors]
        if self.influence.initial is not None:
            initial = self.initial_entries()
            assert initial is not None
            tensors.append(initial)
        return tensors

    @torch.enable_grad()
    def current_tensors(self) -> list[Tensor]:
        """The tensors whose influence is carried, in their own shapes, as functions of the current parameters."""
        return self._tensors(self.cell.projected(self.cell.zero_rows(1))[0])

    @full_precision
    def verify(
        self,
        verifier: Verifier,
        recorded: list[RecordedSteps],
        projections: tuple[Projection, ...],
        first: Tensor,
        last: Tensor,
    ) -> None:
        """Compare the derivatives of a segment with one ordinary backward pass through its own graph.

        Args:
            verifier: what draws and judges.
            recorded: the steps of the segment.
            projections: of its rows, or of a part of them.
            first: the entries that entered it, ``(B, *state_shape)``, with their graph.
            last: those that left it, ``(B, *state_shape)``.

        Raises:
            DisagreementError: naming the parameters; on a CUDA device later.
        """
        named = [(name, p) for name, p in self.cell.named_parameters() if p.requires_grad]
        parameters = [p for _, p in named]
        stream, cotangent = verifier.cotangent(last)
        try:
            captured = self.influence.capture(recorded)
        except NonFiniteError:
            return  # told when the segment is committed, verified or not
        direct, through = self.influence.through(captured, len(captured.decays), cotangent)
        tensors = [tensor for projection in projections for tensor in projection.tensors]
        with without_hooks(parameters):  # type: ignore[arg-type]
            of_tensors = pull_back(tensors, self.of_tensors(direct), parameters)
            entered, *whole = torch.autograd.grad(
                last, [first, *parameters], cotangent, retain_graph=True, allow_unused=True
            )
            entered = torch.zeros_like(through) if entered is None else entered
            before = pull_back([first], [entered], parameters)  # what happened before the segment
        found, expected = {STATE: through[stream]}, {STATE: entered[stream]}
        for (name, p), mine, all_of_it, not_of_it in zip(named, of_tensors, whole, before, strict=True):
            if all_of_it is not None or mine is not None:
                zero = torch.zeros_like(p)
                found[name] = zero if mine is None else mine
                expected[name] = (zero if all_of_it is None else all_of_it) - (zero if not_of_it is None else not_of_it)
        others = entered.clone()
        others[stream] = 0
        found[OTHER_STREAMS], expected[OTHER_STREAMS] = others, torch.zeros_like(others)
        verifier.compare(recorded[0].number, stream, found, expected, tolerance_of(self.dtype), _REASON)

    def _check_weights(self, projections: tuple[Projection, ...]) -> None:
        """Check that weights, biases and Learned values depend neither on the input of a segment nor on chance.

        Raises:
            ContractError: naming the value of ``project``.
        """
        with torch.no_grad():
            others, _ = self.cell.projected(self.cell.zero_rows(1))
        changed = [
            f"value {number} of project: a weight, bias or Learned value changes with the input, or when it is made"
            " again: it may depend on parameters only"
            for number, (one, other) in enumerate(zip(projections, others, strict=True))
            if any(differs(a, b.detach()) for a, b in zip(other.tensors, one.tensors, strict=True))
        ]
        if changed:
            raise ContractError(changed)

    def checked_mask(self, streams: Tensor | None) -> Tensor:
        """A mask of streams ``(B,)`` on the engine's device, see :func:`~sparse_rtrl.learners.engine.checked_mask`."""
        return checked_mask(streams, self.batch_size, self.device)

    def dense_influence(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every parameter, ``(B, *state_shape, *shape)``, up to date; for looking at."""
        self.influence.commit()
        named = [(name, p) for name, p in self.cell.named_parameters() if p.requires_grad]
        parameters = [p for _, p in named]
        u = self.cell.zero_entries(self.batch_size)
        shape = u.shape
        tensors = self.current_tensors()

        def by_parameter(u: Tensor) -> list[Tensor | None]:
            return pull_back(tensors, self._of_kept(self.influence.carried(u)), parameters)

        rows: list[list[Tensor | None]] = []
        for place in range(u.numel()):
            u = torch.zeros_like(u)
            u.view(-1)[place] = 1
            found = by_parameter(u)
            if u.is_complex():
                # The gradient by a real parameter is the real part of conj(u) dh/dθ.
                second = by_parameter(1j * u)
                found = [
                    None if a is None or b is None else a.conj() if a.is_complex() else torch.complex(a, b)
                    for a, b in zip(found, second, strict=True)
                ]
            rows.append(found)
        return {
            name: torch.stack([row[i] for row in rows]).view(*shape, *p.shape)  # type: ignore[misc]
            for i, (name, p) in enumerate(named)
            if rows[0][i] is not None
        }

    def past_gradients(self, position: int, u: Tensor, number: int) -> list[Tensor | None]:
        """Gradients through the past before a segment, one in the own shape of each tensor the influence is that of.

        Args:
            position: place of the segment in the window.
            u: gradient of the loss by the entries that entered it, ``(B, *state_shape)``.
            number: number of its first step, for messages.
        """
        return self._of_kept(self.influence.loss_gradient(position, u, number, last=not graph_is_kept()))

    def _of_kept(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients of projections and of initial entries, one per tensor of :meth:`current_tensors`."""
        *of_projections, initial = gradients
        return [*self.of_tensors(of_projections), *([] if self.influence.initial is None else [initial])]

    def of_tensors(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients ``(M, J)`` of projections as those of their weights, biases and values, real where they are."""
        out: list[Tensor | None] = []
        for gradient, parts in zip(gradients, self._parts, strict=True):
            for place, (shape, is_complex) in enumerate(parts):
                if gradient is None:
                    out.append(None)
                    continue
                part = gradient if len(parts) == 1 else gradient[:, -1] if place else gradient[:, :-1]
                part = part if is_complex or not part.is_complex() else part.real
                out.append(part if part.shape == shape else part.reshape(shape))
        return out

    def check_parameters(self) -> None:
        """Check that the parameters are of the shape, dtype and device that they had.

        Raises:
            RuntimeError: if one is not.
        """
        for name, module, attribute, expected in self._parameters:
            parameter = module._parameters.get(attribute)
            if parameter is None:
                raise RuntimeError(f"parameter {name} was taken out of the cell: build a new learner after that")
            now = _kind(parameter)
            if now != expected:
                raise RuntimeError(
                    f"parameter {name} was {describe(*expected)} when the learner was built and is {describe(*now)}"
                    " now: build a new learner after changing a cell"
                )

    def admit(self, projections: tuple[Projection, ...]) -> list[str]:
        """Keep the influence of what became trainable, starting at zero; returns its names."""
        new = []
        for number, (projection, kept) in enumerate(zip(projections, self.influence.kept, strict=True)):
            layout = self._layouts[number]
            if not kept and layout is not None and any(tensor.requires_grad for tensor in projection.tensors):
                self.influence.add(number, layout, self._columns[number])
                new.append(f"value {number} of project")
        return [*new, *self.admit_initial()]

    def admit_initial(self) -> list[str]:
        """As :meth:`admit`, for initial entries that became trainable."""
        initial = self.initial_entries() if self.influence.initial is None else None
        if initial is None:
            return []
        refused = _initial_refusals(self.cell, initial, self.batch_size)
        if refused:
            raise ContractError(refused)
        self.influence.add_initial()
        return ["initial_entries"]

    def _check_new_state(self, states: list[Tensor]) -> None:
        """Check that every new state is finite.

        Raises:
            NonFiniteError: naming the parameter that holds NaN or infinity, or else the state.
        """
        if cmath.isfinite(states[-1].detach().sum().item()):
            return  # a state that is not finite stays so; if only the sum overflowed, the checks below pass
        for name, parameter in self.cell.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(self.steps, list(range(self.batch_size)), name)
        for number, state in enumerate(states[1:], self.steps):
            check_finite(number, {"the new state": state})


def check_inputs(projections: tuple[Projection, ...], entry: GraphNode = None) -> None:
    """Check that what weights multiply, and what is given, does not depend on trainable tensors.

    Args:
        projections: of a segment or a part of it.
        entry: the node of its graph where the past begins, if it has one.

    Raises:
        ContractError: naming the value of ``project``.
    """
    for number, projection in enumerate(projections):
        x = projection.x if isinstance(projection, Mapped) else None if projection.tensors else projection.value
        if x is not None and x.requires_grad and walk(x, entry).accumulators:
            raise ContractError(
                [
                    f"value {number} of project depends on trainable tensors through its input: take the input as it is"
                    " (detach it), give Mapped a weight that is a function of the parameters, or carry the module that"
                    " makes the input with Carry"
                ]
            )


def _initial_refusals(cell: DiagonalCell, initial: Tensor, batch_size: int) -> list[str]:
    """What is wrong with initial entries ``(B, *state_shape)``, for the engine of a cell."""
    zeros = cell.zero_entries(0)
    if initial.shape != (batch_size, *cell.state_shape) or initial.dtype != zeros.dtype:
        return [
            f"initial_entries({batch_size}) must be {zeros.dtype} {(batch_size, *cell.state_shape)}, got"
            f" {initial.dtype} {tuple(initial.shape)}"
        ]
    own = {id(p) for p in cell.parameters()}
    return [
        f"initial_entries depends on a trainable tensor of shape {tuple(variable.shape)} that is no parameter of the"
        " cell: make it one, or detach it"
        for number, (variable, _) in walk(initial, None).accumulators.items()
        if number not in own
    ]


def pull_back(
    tensors: list[Tensor], gradients: Sequence[Tensor | None], parameters: list[nn.Parameter]
) -> list[Tensor | None]:
    """Gradients of tensors, in their own shapes, as those of the parameters they are made of; None without a path."""
    pairs = [(t, g) for t, g in zip(tensors, gradients, strict=True) if g is not None and t.requires_grad]
    if not pairs or not parameters:
        return [None] * len(parameters)
    outputs, cotangents = zip(*pairs, strict=True)
    with without_hooks(parameters):  # type: ignore[arg-type]
        return list(torch.autograd.grad(outputs, parameters, cotangents, retain_graph=True, allow_unused=True))


def _kind(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype, torch.device]:
    assert tensor is not None
    return tensor.shape, tensor.dtype, tensor.device
