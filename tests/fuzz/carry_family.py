"""Random modules through ``Carry``: segments, windows, first states, restarts, reloads, hooks."""

import copy
import pickle
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_rtrl import Carry
from sparse_rtrl.capture.taped import TapedSteps

from . import features
from .case import Case, Gradients, Way, added, gradients_of
from .draw import Draw
from .modules import COMPLEX, CellLoop, LayerLoop, RandomModule, StackLoop, Started
from .parts import Doubled, detached
from .slot_family import Stream

Hook = tuple[int, str, float]


def where(mask: Tensor, new: Any, old: Any, batch_dim: int) -> Any:
    """Streams of a nest of states replaced."""

    def one(a: Tensor, b: Tensor) -> Tensor:
        shape = [1] * b.dim()
        shape[batch_dim] = -1
        return torch.where(mask.view(shape), a, b)

    return pytree.tree_map(one, new, old)


def bptt(model: Started, stream: Stream, hook: Hook | None, truncate: bool) -> Gradients:
    """Gradient through the whole past, see :func:`slot_family.bptt`."""
    h = None if model.start.startswith("none") else model.first(stream.x[0])
    early: list[Tensor] = []
    late: list[Tensor] = []
    for number, (start, stop) in enumerate(stream.bounds):
        if number in stream.resets:
            h = where(stream.resets[number], model.first(stream.x[start]), h, model.batch_dim)
        if truncate and h is not None:
            h = detached(h)
        outputs, h = model(stream.x[start:stop], h)
        (early if hook is not None and number < hook[0] else late).append((outputs * stream.c[start:stop]).sum())
    if early:
        sum(early).backward(retain_graph=True)
    if hook is not None:
        model.get_parameter(hook[1]).register_hook(Doubled(hook[2]))
    sum(late).backward()
    return gradients_of(model)


def random_module(draw: Draw) -> nn.Module:
    """A body of some kind."""
    return draw.one_of(*[RandomModule] * 6, CellLoop, CellLoop, LayerLoop, LayerLoop, StackLoop)(draw)


def make(draw: Draw) -> Case:
    """A random case."""
    steps, batch = draw.integer(3, 10), draw.integer(1, 4)
    stream = Stream(draw, steps, batch, draw.one_of(1, 1, 2, 4))
    model = Started(random_module(draw), draw)
    names = model.body.names
    hook = None
    ways = ["load", "copy", "deepcopy", "pickle"] if "parametrized" not in names else ["load", "copy", "deepcopy"]
    edits = {n: draw.one_of(*ways) for n in range(1, len(stream.bounds)) if draw.chance(0.04)}
    label = ", ".join(names)
    if model.start not in ("zeros", "fixed"):
        label += f", start: {model.start}"
    if not edits and draw.chance(0.1):
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        hook = draw.integer(0, len(stream.bounds) - 1), draw.one_of(*trainable), draw.one_of(2.0, -1.0, 0.5)
        label += ", parameter hook"
    commit_every = draw.one_of(1, 1, 2, 3, "auto", "auto")
    options: dict[str, Any] = {
        "commit_every": commit_every,
        "batch_dim": model.batch_dim,
        **features.supported(
            Carry.__init__, verify=draw.one_of("sample", "always", "never", 2), capture=draw.one_of("auto", "dense")
        ),
    }
    late = isinstance(commit_every, int) and commit_every > 1 and hook is None and draw.chance(0.4)
    single = model.body.smooth and not COMPLEX & set(names) and draw.chance(0.08)
    split = draw.chance(0.3)  # a segment by several calls of the module
    if single:
        model, stream, label = model.float(), stream.to(torch.float32), f"{label}, float32"

    def run(own: Started, carry: Any, counts: Counter[str], found: Gradients) -> Gradients:
        pending: list[Tensor] = []
        waiting = 0
        if own.start.startswith("none"):
            h = None
        else:
            h = carry(own.first(stream.x[0]))
        buffer = torch.empty_like(stream.x)
        for number, (start, stop) in enumerate(stream.bounds):
            mask = stream.resets.get(number)
            if not late or waiting >= commit_every or mask is not None or number in edits:
                pay(pending)
                waiting = 0
            if hook is not None and hook[0] == number:
                own.get_parameter(hook[1]).register_hook(Doubled(hook[2]))
                counts["parameter hooks"] += 1
            if number in edits and isinstance(carry, Carry):
                counts[f"reload: {edits[number]}"] += 1
                if edits[number] == "load":
                    other = Carry(own, **options)
                    other.load_state_dict(carry.state_dict())
                    carry = other
                elif edits[number] == "copy":
                    carry = copy.copy(carry)
                else:
                    here = gradients_of(own)
                    found = added(here, found) if found else here
                    carry = copy.deepcopy(carry) if edits[number] == "deepcopy" else pickle.loads(pickle.dumps(carry))
                    own = carry.module
                    own.zero_grad()
                h = carry(detached(h))
            if mask is not None:
                h = restarted(own, carry, h, mask, stream.x[start], draw, counts)
            xs = stream.x[start:stop]
            if not late:
                xs = buffer[: len(xs)].copy_(xs)
                counts["input buffers reused"] += 1
            parts = xs.split(1) if split else [xs]
            outputs = []
            for part in parts:
                output, h = own(part, h)
                outputs.append(output)
            h = carry(h)
            counts[f"segment of {len(xs)}"] += 1
            influence = getattr(getattr(carry, "_past", None), "_influence", None)
            counts["taped segments"] += influence is not None and isinstance(
                (influence.window or [None])[-1], TapedSteps
            )
            c = stream.c[start:stop]
            if bool(c.any()):
                pending.append((torch.cat(outputs) * c).sum())
            counts["late losses"] += late and len(pending) > 1
            waiting += 1
            if not late:
                pay(pending)
        pay(pending)
        counts["carries"] += 1
        return added(gradients_of(own), found) if found else gradients_of(own)

    def learn(counts: Counter[str]) -> Gradients:
        own = copy.deepcopy(model)
        counts[f"start: {own.start}"] += 1
        counts.update(f"operation: {name}" for name in names)
        return run(own, Carry(own, **options), counts, {})

    def plain() -> None:
        run(copy.deepcopy(model), Detach(), Counter(), {})

    def reference(way: Way) -> Gradients:
        return bptt(way.of(model), stream.to(way.dtype), hook, way.truncate)

    reasons = (("too late",) if late else ()) + (("complex",) if COMPLEX & set(names) else ())
    return Case(f"carry: {label}", learn, reference, reasons=reasons, plain=plain, float32=single)


class Detach:
    """What a loop of truncated backpropagation does instead of carrying."""

    def __call__(self, h: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, h)

    def reset(self, streams: Tensor | None = None) -> None:
        pass


def restarted(
    own: Started, carry: Any, h: Any, mask: Tensor, context: Tensor, draw: Draw, counts: "Counter[str]"
) -> Any:
    """The state after some streams started anew, in one of the ways that users have."""
    way = draw.one_of("where", "where", "reset and where", "in place")
    if bool(mask.all()) and draw.chance(0.5):
        counts["restart: all, reset"] += 1
        carry.reset()
        return None if own.start.startswith("none") else carry(own.first(context))
    if way == "in place" and own.start == "zeros":
        counts["restart: in place"] += 1
        for leaf in pytree.tree_leaves(h):
            if leaf.is_floating_point() or leaf.is_complex():
                leaf[(slice(None),) * own.batch_dim + (mask,)] = 0
        return h
    if way == "reset and where":
        carry.reset(mask)
    counts[f"restart: {way.replace('in place', 'where')}"] += 1
    return where(mask, own.first(context), h, own.batch_dim)


def pay(pending: list[Tensor]) -> None:
    """Send the losses that wait backwards, together."""
    if pending:
        sum(pending).backward()
        pending.clear()
