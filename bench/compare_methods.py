"""The ways to a gradient that ``compare.py`` measures: one class each, all for the same cell on the same stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from sparse_rtrl import RTRL, Routing, SlotMoECell, estimate
from sparse_rtrl.capture.verify import Verify
from sparse_rtrl.cells.slot_cell import gather_slots, scatter_slots
from sparse_rtrl.training.baselines import DenseJacobianRTRL
from sparse_rtrl.training.tasks import Batch

INPUT, CLASSES = 8, 4
POOL = 4096
CONFIGURATIONS = {
    "A": {"slot_size": 32, "num_slots": 4, "num_experts": 4},
    "B": {"slot_size": 64, "num_slots": 16, "num_experts": 64},
    "tiny": {"slot_size": 4, "num_slots": 3, "num_experts": 3},
}
"""Sizes of the cells; ``top_k``, ``read_slots`` and ``write_slots`` are 2."""


class UserCell(SlotMoECell):
    """The same cell as someone would write it who does not know the library from the inside."""

    def transition(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> Tensor:
        return super().transition(x, h_read, h_write, routing)

    def update(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        h_write_new = self.transition(x, h_read, h_write, routing)
        slots = torch.cat((h_read, h_write_new), dim=1) + F.embedding(routing.support, self.slot_table)
        return h_write_new, self.readout(x, slots)


def build_cell(config: str, kind: type[SlotMoECell] = SlotMoECell) -> SlotMoECell:
    """The cell of a configuration, the same at every call."""
    torch.manual_seed(0)
    sizes = CONFIGURATIONS[config]
    return kind(input_size=INPUT, output_size=CLASSES, top_k=2, read_slots=2, write_slots=2, **sizes)


class Stream:
    """Inputs ``(n, B, 8)`` and classes ``(n, B)``, asked at every step; repeats after ``POOL`` steps."""

    def __init__(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.batch = batch
        self.x = torch.randn(POOL, batch, INPUT, generator=generator)
        self.target = torch.randint(CLASSES, (POOL, batch), generator=generator)

    def steps(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        first = start % POOL
        return self.x[first : first + count], self.target[first : first + count]


def summed_loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross entropy summed over all tokens."""
    return F.cross_entropy(outputs.flatten(0, -2), target.flatten(), reduction="sum")


def unroll(cell: SlotMoECell, x: Tensor, target: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and last state of some steps: ``SlotCell.forward`` without what a learner needs."""
    outputs = []
    for t in range(x.shape[0]):
        with torch.no_grad():
            routing = cell.route(x[t], state)
        h_read, h_write = gather_slots(state, routing.read), gather_slots(state, routing.write)
        written, output = cell.update(x[t], h_read, h_write, routing)
        state = scatter_slots(state, routing.write, written)
        outputs.append(output)
    return summed_loss(torch.stack(outputs), target), state


class Method:
    """One way to the gradient of the mean loss over a whole sequence, which :meth:`run` adds to ``.grad``.

    Args:
        config: one of :data:`CONFIGURATIONS`.
        batch: streams.
        cell: another cell than that of the configuration.
    """

    exact = True
    pilot = 64
    """Steps of a first run that tells how long others will take: at least a segment."""
    cell_class: type[SlotMoECell] = SlotMoECell

    def __init__(self, config: str, batch: int, cell: SlotMoECell | None = None) -> None:
        self.cell = build_cell(config, self.cell_class) if cell is None else cell
        self.batch = batch

    def run(self, stream: Stream, length: int, at: Callable[[int], None] | None = None) -> None:
        """A whole sequence; ``at`` is called with the number of finished steps by those that go on step by step."""
        for parameter in self.cell.parameters():
            parameter.grad = None
        for done in self.steps(stream, length):
            if at is not None:
                at(done)

    def steps(self, stream: Stream, length: int) -> Iterator[int]:
        raise NotImplementedError

    def gradient(self, out: Tensor | None = None) -> Tensor:
        """All of ``.grad`` in float64, in one row; into ``out`` without further memory."""
        sizes = [parameter.numel() for parameter in self.cell.parameters()]
        out = torch.empty(sum(sizes), dtype=torch.float64) if out is None else out
        for part, parameter in zip(out.split(sizes), self.cell.parameters(), strict=True):
            part.view_as(parameter).copy_(parameter.grad)
        return out


class BPTT(Method):
    """Autograd through the whole sequence, eagerly."""

    def steps(self, stream: Stream, length: int) -> Iterator[int]:
        total, state = torch.zeros(()), self.cell.initial_state(self.batch)
        with parametrize.cached():
            for t in range(0, length, POOL):
                loss, state = unroll(self.cell, *stream.steps(t, min(POOL, length - t)), state)
                total = total + loss
            (total / (length * self.batch)).backward()
        yield length


class CompiledBPTT(Method):
    """Autograd through chunks of steps that ``torch.compile`` compiled, forward and backward."""

    chunk = 4

    def __init__(self, config: str, batch: int) -> None:
        super().__init__(config, batch)
        # The effective orthogonal weight is a leaf of its own, so that the compiler does not meet the parametrization.
        self.plain = build_cell(config)
        parametrize.remove_parametrizations(self.plain.core, "weight")
        for name, parameter in self.cell.named_parameters():
            if not name.startswith("core."):
                module, _, attribute = name.rpartition(".")
                setattr(self.plain.get_submodule(module), attribute, parameter)
        self.compiled = torch.compile(unroll, dynamic=False, fullgraph=True)

    def steps(self, stream: Stream, length: int) -> Iterator[int]:
        weight, leaf = self.cell.core.weight, self.plain.core.weight
        with torch.no_grad():
            leaf.copy_(weight)
        leaf.grad = None
        total, state = torch.zeros(()), self.plain.initial_state(self.batch)
        for t in range(0, length, self.chunk):
            loss, state = self.compiled(self.plain, *stream.steps(t, self.chunk), state)
            total = total + loss
        (total / (length * self.batch)).backward()
        weight.backward(leaf.grad)
        yield length


class CheckpointedBPTT(Method):
    """Autograd through chunks of about the square root of the length, whose activations are computed again."""

    def steps(self, stream: Stream, length: int) -> Iterator[int]:
        chunk = min(POOL, 1 << math.ceil(math.log2(length) / 2))
        total, state = torch.zeros(()), self.cell.initial_state(self.batch)
        options = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
        with parametrize.cached():
            _ = self.cell.core.weight  # into the cache here, so that every chunk finds it, also the second time
            for t in range(0, length, chunk):
                loss, state = checkpoint(unroll, self.cell, *stream.steps(t, chunk), state, **options)
                total = total + loss
            (total / (length * self.batch)).backward()
        yield length


class TBPTT(Method):
    """Autograd through segments of 64 steps, no gradient carried between them: another gradient than the others'."""

    exact = False
    segment = 64

    def steps(self, stream: Stream, length: int) -> Iterator[int]:
        state = self.cell.initial_state(self.batch)
        for t in range(0, length, self.segment):
            with parametrize.cached():
                loss, state = unroll(self.cell, *stream.steps(t, self.segment), state.detach())
            (loss / (length * self.batch)).backward()
            yield t + self.segment


class JacrevRTRL(Method):
    """``vmap`` of ``torch.func.jacrev`` at every step, dense influence of every parameter."""

    pilot = 4

    def __init__(self, config: str, batch: int) -> None:
        super().__init__(config, batch)
        self.dense = DenseJacobianRTRL(self.cell)

    def steps(self, stream: Stream, length: int) -> Iterator[int]:
        repeats = -(-length // POOL)
        whole = Batch(stream.x.repeat(repeats, 1, 1)[:length], stream.target.repeat(repeats, 1)[:length])
        for done, _ in enumerate(self.dense.segments(whole), 1):
            yield done


class SparseRTRL(Method):
    """The learner in segments, one influence update for each."""

    segment: int = 1
    verify: Verify = "sample"

    def __init__(self, config: str, batch: int) -> None:
        super().__init__(config, batch)
        self.learner = RTRL(self.cell, batch, commit_every=self.segment, verify=self.verify)

    def steps(self, stream: Stream, length: int) -> Iterator[int]:
        self.learner.reset()
        count = min(self.segment, length)
        for t in range(0, length, count):
            x, target = stream.steps(t, count)
            (summed_loss(self.learner.unroll(x), target) / (length * self.batch)).backward()
            yield t + count
        self.learner.flush()

    def gradient(self, out: Tensor | None = None) -> Tensor:
        self.learner.flush()
        return super().gradient(out)


class SparseRTRL8(SparseRTRL):
    """Segments of 8 steps."""

    segment = 8


class SparseRTRL64(SparseRTRL):
    """Segments of 64 steps."""

    segment = 64


class UnverifiedRTRL(SparseRTRL64):
    """Segments of 64 steps, none of them compared with an ordinary backward pass."""

    verify = "never"


class VerifiedRTRL(SparseRTRL64):
    """Segments of 64 steps, each of them compared with an ordinary backward pass."""

    verify = "always"


class SuggestedRTRL(SparseRTRL):
    """Segments as long as ``estimate`` suggests, at most 1024."""

    def __init__(self, config: str, batch: int) -> None:
        self.segment = min(1024, estimate(build_cell(config), batch).segment)
        super().__init__(config, batch)


class UserRTRL(SparseRTRL64):
    """Segments of 64 steps of a cell that the library has no fused pass for."""

    cell_class = UserCell


class TokenRTRL(Method):
    """A gradient and an optimizer step at every token, ``commit_every="auto"``.

    The learning rate is 0: the optimizer does its work, and the sum of the gradients can still be compared with BPTT.
    """

    def __init__(self, config: str, batch: int) -> None:
        super().__init__(config, batch)
        self.learner = RTRL(self.cell, batch, commit_every="auto")
        self.optimizer = torch.optim.SGD(self.cell.parameters(), lr=0.0, fused=True)
        self.learner.attach(self.optimizer)

    def steps(self, stream: Stream, length: int) -> Iterator[int]:
        self.learner.reset()
        for t in range(length):
            x, target = stream.steps(t, 1)
            (summed_loss(self.learner(x[0]), target) / (length * self.batch)).backward()
            self.optimizer.step()
            yield t + 1


METHODS: dict[str, type[Method]] = {
    "bptt": BPTT,
    "bptt-compiled": CompiledBPTT,
    "bptt-checkpointed": CheckpointedBPTT,
    "tbptt-64": TBPTT,
    "rtrl-1": SparseRTRL,
    "rtrl-8": SparseRTRL8,
    "rtrl-64": SparseRTRL64,
    "rtrl-64-unverified": UnverifiedRTRL,
    "rtrl-64-verified": VerifiedRTRL,
    "rtrl-suggested": SuggestedRTRL,
    "rtrl-token": TokenRTRL,
    "rtrl-64-user-cell": UserRTRL,
    "jacrev": JacrevRTRL,
}


def reference_gradient(config: str, stream: Stream, length: int, truncated: bool) -> Tensor:
    """The gradient by BPTT in float64, or by TBPTT in float64, along the slots and experts chosen in float32.

    A top-k can fall differently in another precision; the choices of the float32 forward pass are recorded for it.

    Args:
        config: one of :data:`CONFIGURATIONS`.
        stream: what the contestants see.
        length: steps, at most :data:`POOL`.
        truncated: whether no gradient is carried between segments of 64 steps.
    """
    cell, routings = build_cell(config), []
    state = cell.initial_state(stream.batch)
    with torch.no_grad(), parametrize.cached():
        for x in stream.steps(0, length)[0]:
            routings.append(cell.route(x, state))
            state = cell(x, state, routings[-1])[2]
    recorded = iter(routings)
    cell.route = lambda x, state: next(recorded)  # type: ignore[method-assign]
    method = (TBPTT if truncated else BPTT)(config, stream.batch, cell.double())
    exact = Stream(stream.batch)
    exact.x = exact.x.double()
    method.run(exact, length)
    return method.gradient()
