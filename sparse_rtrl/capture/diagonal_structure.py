"""How the values of a diagonal cell lie in its state, and along which axes their influence must be kept."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_rtrl.capture.verify import tolerance_of
from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Learned, Mapped, Projection
from sparse_rtrl.errors import ContractError

TOLERANCE = 256
"""Rounding units by which derivatives may differ along an axis and still count as the same."""


@dataclass(frozen=True)
class Layout:
    """Which state entries a projection's influence is kept for.

    Every axis of the state is of one kind: *kept*, both the value and the influence vary along it; *summed*, many state
    entries share a value there, and the influence has a row for each of them; *queried*, the value varies and the
    influence does not, so that one row serves all values; *ignored*, neither varies.

    Attributes:
        shape: of the projection's value, broadcastable to the state.
        window: first entry and end along each axis that the value reaches.
        varies: whether decay or derivative vary along the axis.
    """

    shape: tuple[int, ...]
    window: tuple[tuple[int, int], ...]
    varies: tuple[bool, ...]
    kept: tuple[int, ...] = field(init=False, compare=False)
    summed: tuple[int, ...] = field(init=False, compare=False)
    queried: tuple[int, ...] = field(init=False, compare=False)
    rows: tuple[int, int, int] = field(init=False, compare=False)
    """Numbers of summed, kept and queried positions."""
    plain: bool = field(init=False, compare=False)
    """Whether every state entry has its own value and its own row of influence."""

    def __post_init__(self) -> None:
        axes = range(len(self.shape))
        shared = [size == 1 and end - start > 1 for size, (start, end) in zip(self.shape, self.window, strict=True)]
        for name, chosen in (
            ("kept", [a for a in axes if self.varies[a] and not shared[a]]),
            ("summed", [a for a in axes if self.varies[a] and shared[a]]),
            ("queried", [a for a in axes if not self.varies[a] and self.shape[a] > 1]),
        ):
            object.__setattr__(self, name, tuple(chosen))
        rows = tuple(torch.Size(self._sizes(chosen)).numel() for chosen in (self.summed, self.kept, self.queried))
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "plain", len(self.kept) == len(self.shape))

    def _sizes(self, axes: tuple[int, ...]) -> list[int]:
        return [self.window[a][1] - self.window[a][0] for a in axes]

    def windowed(self, entries: Tensor) -> Tensor:
        """The part of ``(..., *state_shape)`` that the value reaches."""
        lead = entries.dim() - len(self.shape)
        for axis, (start, end) in enumerate(self.window):
            entries = entries.narrow(lead + axis, start, end - start)
        return entries

    def reduce(self, entries: Tensor) -> Tensor:
        """``(..., *state_shape)`` to the rows of the influence, ``(..., R)``, summed axes outside."""
        if self.plain:
            return entries.flatten(entries.dim() - len(self.shape))
        entries = self.windowed(entries)
        lead = entries.dim() - len(self.shape)
        for axis, varies in enumerate(self.varies):
            if not varies:
                entries = entries.narrow(lead + axis, 0, 1)
        order = [lead + a for a in (*self.summed, *self.kept)]
        rest = [a for a in range(lead, entries.dim()) if a not in order]
        return entries.permute(*range(lead), *order, *rest).flatten(lead)

    def constant_error(self, entries: Tensor) -> Tensor:
        """How far ``(..., *state_shape)`` varies along axes where it should not, of complex entries either part.

        Relative to the largest entry that the value reaches; a scalar tensor.
        """
        inside = self.windowed(entries)
        lead = entries.dim() - len(self.shape)
        if inside.is_complex():
            inside = torch.view_as_real(inside.resolve_conj())
        axes = [lead + a for a, varies in enumerate(self.varies) if not varies and inside.shape[lead + a] > 1]
        if not axes:
            return inside.new_zeros(())
        most, least = inside.amax(axes), inside.amin(axes)
        largest = torch.maximum(most.abs(), least.abs()).amax()
        return (most - least).amax() / largest.clamp_min(torch.finfo(largest.dtype).tiny)

    def outside(self, entries: Tensor) -> Tensor:
        """Largest magnitude of ``(..., *state_shape)`` outside the window, a scalar tensor."""
        left = entries.abs()
        self.windowed(left).zero_()
        return left.amax()

    @property
    def compressed(self) -> bool:
        """Whether anything is left out, so that derivatives must be checked against the layout."""
        return any(
            not varies and end - start > 1 for varies, (start, end) in zip(self.varies, self.window, strict=True)
        )

    def query(self, entries: Tensor) -> Tensor:
        """Cotangents of entries ``(B, *state_shape)`` as ``(B, summed, kept, queried)``, ignored axes added up."""
        if self.plain:
            return entries.reshape(entries.shape[0], 1, -1, 1)
        entries = self.windowed(entries)
        ignored = [
            1 + a for a in range(len(self.shape)) if not (a in self.summed or a in self.kept or a in self.queried)
        ]
        if ignored:
            entries = entries.sum(ignored, keepdim=True)
        order = [1 + a for a in (*self.summed, *self.kept, *self.queried, *(a - 1 for a in ignored))]
        return entries.permute(0, *order).reshape(entries.shape[0], *self.rows)

    def unquery(self, gradient: Tensor) -> Tensor:
        """Gradient ``(kept, queried, J)`` of the rows of a weight as ``(M, J)``, in the order of the value."""
        if self.plain:
            return gradient.squeeze(1)
        axes = (*self.kept, *self.queried)
        sizes = self._sizes(axes)
        back = sorted(range(len(axes)), key=lambda place: axes[place])
        return gradient.reshape(*sizes, -1).permute(*back, len(axes)).reshape(-1, gradient.shape[-1])

    def by_value(self, entries: Tensor) -> Tensor:
        """State entries ``(..., *state_shape)`` added up over those that share a value, ``(..., M)``."""
        lead = entries.dim() - len(self.shape)
        shared = [lead + a for a, size in enumerate(self.shape) if size == 1]
        return (entries.sum(shared, keepdim=True) if shared else entries).flatten(lead)


def derivatives(
    cell: DiagonalCell, before: Tensor, values: list[Tensor], wanted: list[bool]
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """Diagonals of the Jacobians of one step: of every new state entry by the old one and by the values at its place.

    One backward pass with ones gives all of them, because entries do not mix (two passes where a real value enters a
    complex state). That they do not is proven where all operations of ``step`` are element by element; where another
    one is met, a second pass with random weights shows it.

    Args:
        cell: the cell.
        before: state entries before the step, ``(N, *state_shape)``, detached.
        values: those of the projections, broadcastable to ``(N, *state_shape)``, detached.
        wanted: for which of them the derivative is asked.

    Returns:
        ``dh/dh_before`` and, per projection, ``dh/dy``, each ``(N, *state_shape)``, None where it is not wanted; and
        the new state.

    Raises:
        ContractError: if ``step`` reads a trainable tensor that did not come through ``project``, or entries mix.
    """
    with torch.enable_grad():
        h = before.detach().requires_grad_()
        values = [
            value.detach().expand(before.shape).requires_grad_() if want else value
            for value, want in zip(values, wanted, strict=True)
        ]
        leaves = [h, *(value for value, want in zip(values, wanted, strict=True) if want)]
        new = cell.step(h, *values)
        variables, mixing = _graph_of(new)
        read = direct_reads(cell, variables, leaves)
        if read:
            raise ContractError(read)
        if mixing:
            weights = 0.5 + torch.rand(new.shape, device="cpu", generator=torch.Generator().manual_seed(0))
            expected = diagonals(new, leaves, weights.to(new), retain_graph=True)
        found = diagonals(new, leaves)
        if mixing and any(differs(a, b) for a, b in zip(found, expected, strict=True)):
            raise ContractError([f"step is not element-wise: entries or rows mix, perhaps by {', '.join(mixing)}"])
    by_leaf = iter(found[1:])
    return found[0], [next(by_leaf) if want else None for want in wanted], new.detach()


def direct_reads(cell: DiagonalCell, variables: list[Tensor], leaves: list[Tensor]) -> list[str]:
    """What a step reads itself, but must not: trainable tensors in its graph beside ``leaves``, any shapes."""
    given = {id(leaf) for leaf in leaves}
    read = [variable for variable in variables if id(variable) not in given]
    names = {id(p): name for name, p in cell.named_parameters()} if read else {}
    return [
        f"step uses the parameter {names[id(variable)]} itself: pass it through project, as Learned or Mapped"
        if id(variable) in names
        else f"step uses a trainable tensor of shape {tuple(variable.shape)} that is no parameter of the cell: make it"
        " one and pass it through project, as Learned or Mapped"
        for variable in read
    ]


_ELEMENTWISE = frozenset(
    "Abs Add Addcdiv Addcmul Alias Angle Clamp ClampMax ClampMin Clone Complex Conj Cos Cosh Div Elu Erf Exp Expand"
    " Expm1 Gelu Hardsigmoid Imag LeakyRelu Lerp Log Log1P LogSigmoid Maximum Minimum Mul Neg Polar Pow Real"
    " Reciprocal Relu Rsqrt Rsub Sgn Sigmoid Silu Sin Sinh Softplus Sqrt Sub Tan Tanh ToCopy ViewAsComplex ViewAsReal"
    " Where".split()
)
"""Operations of torch that work element by element, by the names of their nodes without ``Backward0``."""


def _graph_of(tensor: Tensor) -> tuple[list[Tensor], list[str]]:
    """The trainable leaves in a tensor's graph, and its operations that may mix elements; runs at every capture."""
    leaves: list[Tensor] = []
    mixing: list[str] = []
    stack = [tensor.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.append(variable)
            continue
        name = node.name()
        if name.rstrip("0123456789").removesuffix("Backward") not in _ELEMENTWISE:
            mixing.append(name)
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                stack.append(source)
    return leaves, mixing


def diagonals(
    new: Tensor, leaves: list[Tensor], phases: Tensor | None = None, retain_graph: bool = False
) -> list[Tensor]:
    """Derivatives ``(N, *state_shape)`` of ``new`` by the entry of each leaf at its place, if no other depends on it.

    Args:
        new: ``(N, *state_shape)``.
        leaves: ``(N, *state_shape)`` each.
        phases: numbers, complex ones perhaps, to weight the entries with; the result does not depend on them if the
            Jacobian is diagonal and holomorphic.
        retain_graph: whether the graph is needed again.
    """
    if not new.requires_grad:
        return [torch.zeros_like(new) for _ in leaves]
    weight = torch.ones_like(new) if phases is None else phases
    two = new.is_complex() and not all(leaf.is_complex() for leaf in leaves)
    first = torch.autograd.grad(new, leaves, weight, retain_graph=two or retain_graph, allow_unused=True)
    second = first
    if two:
        second = torch.autograd.grad(new, leaves, 1j * weight, retain_graph=retain_graph, allow_unused=True)
    out = []
    for leaf, a, b in zip(leaves, first, second, strict=True):
        if a is None or b is None:
            derivative = torch.zeros_like(new)
        elif leaf.is_complex() or not new.is_complex():
            derivative = a.conj().resolve_conj() if phases is None else (a / phases).conj().resolve_conj()
        else:
            # Re(conj(d) w) and Re(conj(d) i w) are the parts of d conj(w), seen from the phase.
            derivative = torch.complex(a, b)
            derivative = derivative if phases is None else derivative / phases.conj()
        out.append(derivative)
    return out


def _in_double(cell: DiagonalCell) -> DiagonalCell:
    """A copy of a cell in double precision, complex parameters too, in which small differences are seen."""
    cell = copy.deepcopy(cell).double()
    for parameter in cell.parameters():
        if parameter.is_complex():
            parameter.data = parameter.data.to(torch.complex128)
    return cell


@torch.enable_grad()
def find_layouts(cell: DiagonalCell) -> list[Layout | None]:
    """The layout of every projection of a cell, from derivatives at random states and values; None for given ones.

    Raises:
        ContractError: if state entries mix, if ``step`` uses a parameter itself or is not holomorphic, or if
            projections do not fit the state.
    """
    cell = _in_double(cell)
    generator = torch.Generator().manual_seed(0)
    rows = 3
    like = cell.zero_rows(rows)

    def random(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device="cpu", generator=generator, dtype=dtype).to(like.device)

    x = random(like.shape, like.dtype)
    projections = tuple(cell.project(x))
    _check_projections(cell, projections, rows)
    zeros = cell.zero_entries(rows)
    before = random(zeros.shape, zeros.dtype).requires_grad_()
    values = []
    for projection in projections:
        value = projection.value.detach()
        # Away from initial values, which may agree where later ones do not.
        noise = torch.rand(value.shape, device="cpu", generator=generator, dtype=like.dtype).to(value.device)
        values.append((value * (1 - 0.5 * noise) + 0.01 * noise).expand(before.shape).requires_grad_())
    new = cell.step(before, *values)
    if not isinstance(new, Tensor) or new.shape != before.shape or new.dtype != before.dtype:
        got = f"{new.dtype} {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise ContractError([f"step must return state entries {before.dtype} {tuple(before.shape)}, got {got}"])
    _check_step(cell, new, [before, *values], random(new.shape, new.dtype))
    decay, *by_value = diagonals(cell.step(before, *values), [before, *values])
    return [
        _layout(projection, decay, d) if projection.tensors else None
        for projection, d in zip(projections, by_value, strict=True)
    ]


@torch.no_grad()
def check_rows(cell: DiagonalCell, batch_size: int) -> None:
    """Check that a row does not depend on the others, nor on chance, and weights not on the input.

    Some rows are run together and one by one. What couples them only later, or in larger batches, is not seen here.

    Raises:
        ContractError: naming ``project``, ``step`` or ``output``.
    """
    cell = _in_double(cell)
    generator = torch.Generator().manual_seed(1)
    rows = max(3, min(batch_size, 16))
    like = cell.zero_rows(rows)
    x = torch.randn(like.shape, device="cpu", generator=generator, dtype=like.dtype).to(like.device)
    initial = cell.initial_entries(batch_size)[:1].to(cell.zero_entries(0).dtype)

    def run(x: Tensor) -> dict[str, list[Tensor]]:
        projections, values = cell.projected(x)
        fixed = [t for projection in projections for t in projection.tensors]
        h = initial.expand(len(x), *cell.state_shape)
        states = [h]
        for _ in range(2):
            states.append(cell.step(states[-1], *values))
        output = cell.output(x, states[1], states[2], *values)
        by_row = [v for v in values if v.dim() > len(cell.state_shape)]
        return {"weights": fixed, "project": by_row, "step": states[1:], "output": [output]}

    together = run(x)
    for name, again in run(x).items():
        if _differ(together[name], again):
            raise ContractError(
                [
                    f"{'project' if name == 'weights' else name} gives something else when it is called again with the"
                    " same input: it draws random numbers or keeps a state of its own, so a captured step is not the"
                    " step that ran"
                ]
            )
    for row in (0, rows - 1):
        alone = run(x[row : row + 1])
        for name, found in alone.items():
            if name == "weights" and _differ(together[name], found):
                raise ContractError(
                    ["a weight, bias or Learned value of project depends on the input: what depends on it is Given"]
                )
            if name != "weights" and _differ([t[row : row + 1] for t in together[name]], found):
                raise ContractError(
                    [
                        f"rows of the batch influence each other: what {name} gives for row {row} of {rows} is not what"
                        " it gives for that row alone"
                    ]
                )


def _differ(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists of tensors differ by more than rounding."""
    return any(a.shape != b.shape or differs(a, b) for a, b in zip(some, others, strict=True) if isinstance(a, Tensor))


def differs(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors of equal shapes differ by more than rounding of their dtype explains."""
    if torch.equal(found, expected) or not found.numel():
        return False
    error, size = (found - expected).abs().amax(), expected.abs().amax()
    return bool(error > tolerance_of(error.dtype) * size) if error.is_floating_point() else True


def _check_projections(cell: DiagonalCell, projections: tuple[Projection, ...], rows: int) -> None:
    violations = []
    for number, projection in enumerate(projections):
        if not isinstance(projection, Projection):
            violations.append(f"project must return Mapped, Learned or Given values, got {type(projection).__name__}")
            continue
        value = projection.value
        shape = tuple(value.shape) if isinstance(projection, Learned) else tuple(value.shape[1:])
        fits = len(shape) == len(cell.state_shape) and all(
            size in (1, full) for size, full in zip(shape, cell.state_shape, strict=True)
        )
        if not fits or (not isinstance(projection, Learned) and len(value) != rows):
            violations.append(
                f"value {number} of project must be broadcastable to the state {cell.state_shape} with as many"
                f" dimensions, got {shape}"
            )
        inputs = projection.x if isinstance(projection, Mapped) else None if projection.tensors else value
        if isinstance(projection, Mapped) and projection.x.is_complex():
            violations.append(f"value {number} of project maps a complex input; map its parts as real inputs")
        if inputs is not None and inputs.requires_grad:
            violations.append(
                f"value {number} of project depends on parameters through more than one linear map of the input: give"
                " Mapped a weight that is a function of the parameters, or carry the module with Carry"
            )
        if value.is_complex() and not cell.complex_state:
            violations.append(f"value {number} of project is complex, the state is not")
    if violations:
        raise ContractError(violations)


def _check_step(cell: DiagonalCell, new: Tensor, leaves: list[Tensor], noise: Tensor) -> None:
    """Check that entries do not mix: random weights of the entries must give the same diagonals as ones."""
    violations = direct_reads(cell, _graph_of(new)[0], leaves)
    if new.requires_grad:
        phases = noise / noise.abs()
        plain = diagonals(cell.step(*leaves), leaves)
        weighted = diagonals(cell.step(*leaves), leaves, phases)
        names = ["the state", *(f"value {number}" for number in range(len(leaves) - 1))]
        for name, one, other in zip(names, plain, weighted, strict=True):
            if not bool(torch.isfinite(one.abs()).all()):
                violations.append(f"the derivative of step by {name} is not finite at random states and values")
            elif float((one - other).abs().amax()) > 1e-4 * max(1.0, float(one.abs().amax())):
                violations.append(
                    f"step is not element-wise in {name}: entries mix"
                    + (", or it is not holomorphic" if new.is_complex() else "")
                )
    if violations:
        raise ContractError(violations)


def _layout(projection: Projection, decay: Tensor, derivative: Tensor) -> Layout:
    value = projection.value
    shape = tuple(value.shape[-(decay.dim() - 1) :])
    window, varies = [], []
    for axis, size in enumerate(shape):
        others = [a for a in range(decay.dim()) if a != axis + 1]
        reached = derivative.abs().amax(others).nonzero().flatten().tolist()
        whole = size > 1 or not reached
        window.append((0, decay.shape[axis + 1]) if whole else (reached[0], reached[-1] + 1))
    flat = Layout(shape, tuple(window), (True,) * len(shape))
    for axis in range(len(shape)):
        one = Layout(shape, flat.window, tuple(a != axis for a in range(len(shape))))
        error = max(float(one.constant_error(decay)), float(one.constant_error(derivative)))
        varies.append(window[axis][1] - window[axis][0] > 1 and error > TOLERANCE * torch.finfo(decay.dtype).eps)
    return Layout(shape, flat.window, tuple(varies))
