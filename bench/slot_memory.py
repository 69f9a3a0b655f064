"""What the slot cell needs to learn associative recall: one thing changed at a time, ten seeds at once.

``python bench/slot_memory.py --out bench/results/slot_memory.json``. The equations of ``SlotMoECell`` (the core matrix
is the Cayley transform of a free one) are written here for many cells side by side, so that ten seeds train in the time
of one; the gradient is that of backpropagation through the whole sequence, which is that of ``RTRL`` too.
``bench/recall.py`` trains the cell of the library. Every variant differs from the first in one thing:

- *recipe*: the least used slot is written, all are read by softmax weights, identities of slots are small, and every
  input comes with the one before;
- *important slots written*: half of the slots, chosen by importance;
- *sigmoid weights*; *identities of size 1*; *half of the slots read*; *one head*; *without the input before*.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_rtrl.cli.environment import describe_environment
from sparse_rtrl.training.tasks import IGNORE, MultiQueryRecall


@dataclass(frozen=True)
class Variant:
    """How the cells are built; sizes as in ``SlotMoECell``."""

    slots: int
    read: int
    write: int
    least_used: bool = True
    softmax: bool = True
    identity: float = 0.1
    shift: bool = True
    heads: int = 4
    size: int = 16
    experts: int = 2
    top_k: int = 1


def variants(pairs: int) -> dict[str, Variant]:
    """The variants by name, the recipe first."""
    slots = 2 * pairs
    recipe = Variant(slots, read=slots, write=1)
    return {
        "recipe": recipe,
        "important slots written": replace(recipe, least_used=False, write=slots // 2),
        "sigmoid weights": replace(recipe, softmax=False),
        "identities of size 1": replace(recipe, identity=1.0),
        "half of the slots read": replace(recipe, read=slots // 2),
        "one head": replace(recipe, heads=1),
        "without the input before": replace(recipe, shift=False),
    }


class Cells:
    """Cells side by side, one for each seed; ``N`` of them."""

    def __init__(self, variant: Variant, count: int, inputs: int, outputs: int) -> None:
        self.variant, self.outputs = variant, outputs
        size, width = variant.size, inputs * (2 if variant.shift else 1)

        def uniform(fan_in: int, *shape: int) -> Tensor:
            bound = 1 / math.sqrt(fan_in)
            return torch.empty(count, *shape).uniform_(-bound, bound)

        control_bias = uniform(size, 1, 2 * size)
        control_bias[..., :size] = -0.5
        rows = variant.experts * (size + 1)
        self.parameters = {
            "table": torch.randn(count, variant.slots, size) * variant.identity,
            "query_token": torch.randn(count, width, 2 * size) * math.sqrt(2 / width),
            "query_token_bias": uniform(width, 1, 2 * size),
            "key_value": uniform(size, size, 2 * size),
            "control": uniform(size, size, 2 * size),
            "control_bias": control_bias,
            "experts": uniform(size, size, rows),
            "experts_bias": uniform(size, 1, rows),
            "core": 0.1 * torch.randn(count, size, size),
            "readout": uniform(inputs, inputs, size + outputs),
            "readout_bias": uniform(inputs, 1, size + outputs),
            "readout_key_value": uniform(size, size, size + outputs),
        }
        for parameter in self.parameters.values():
            parameter.requires_grad_()

    def run(self, x: Tensor) -> Tensor:
        """Inputs ``(T, N, B, I)`` to logits ``(T, N, B, O)``."""
        v, p = self.variant, self.parameters
        steps, count, batch = x.shape[:3]
        free = p["core"] - p["core"].transpose(1, 2)
        eye = torch.eye(v.size)
        core = torch.linalg.solve(eye + free / 2, eye - free / 2)
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        seen = torch.cat([x, before], -1) if v.shift else x
        query_token = _mapped(seen, p["query_token"], p["query_token_bias"])
        readout = _mapped(x, p["readout"], p["readout_bias"])
        state = x.new_zeros(count, batch, v.slots, v.size)
        outputs = []
        for t in range(steps):
            state, looked_at = self._step(state, query_token[t], core)
            query, skip = readout[t].split([v.size, self.outputs], -1)
            key_value = _per_cell(looked_at, p["readout_key_value"])
            scores = (key_value[..., : v.size] * query.unsqueeze(2)).sum(-1) / math.sqrt(v.size)
            outputs.append((scores.softmax(-1).unsqueeze(-1) * key_value[..., v.size :]).sum(2) + skip)
        return torch.stack(outputs)

    def _step(self, state: Tensor, query_token: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
        """State ``(N, B, S, D)`` to the next, and the slots that the output looks at."""
        v, p = self.variant, self.parameters
        slots = state + p["table"].unsqueeze(1)
        query, token = query_token.chunk(2, -1)
        key, value = _per_cell(slots, p["key_value"]).chunk(2, -1)
        heads = (v.heads, v.size // v.heads)
        scores = (key.unflatten(-1, heads) * query.unflatten(-1, heads).unsqueeze(2)).sum(-1)  # (N, B, S, heads)
        read = scores.detach().sum(-1).topk(v.read, -1).indices
        chosen = _take(scores, read) / math.sqrt(heads[1])
        weights = chosen.softmax(2) if v.softmax else torch.sigmoid(chosen)
        mixed = token + (weights.unsqueeze(-1) * _take(value, read).unflatten(-1, heads)).sum(2).flatten(-2)
        gate, write_query = torch.baddbmm(p["control_bias"], mixed, p["control"]).chunk(2, -1)
        experts = torch.baddbmm(p["experts_bias"], mixed, p["experts"]).unflatten(-1, (v.experts, -1))
        active = _take(experts, experts.detach()[..., -1].topk(v.top_k, -1).indices)
        mixture = (torch.sigmoid(active[..., -1:]) * active[..., :-1]).sum(2, keepdim=True)
        importance = (slots * write_query.unsqueeze(2)).sum(-1, keepdim=True) / math.sqrt(v.size)
        if v.least_used:
            write = state.detach().square().sum(-1).argsort(dim=-1, stable=True)[..., : v.write]
        else:
            write = importance.detach().squeeze(-1).topk(v.write, -1).indices
        old = _take(state, write)
        opened = F.hardsigmoid(_take(importance, write) + 3 * gate.unsqueeze(2))
        new = torch.lerp(old, torch.tanh(_per_cell(old, core) + mixture), opened)
        state_after = state.scatter(2, write.unsqueeze(-1).expand_as(new), new)
        looked_at = torch.cat([_take(slots, read), _take(state_after + p["table"].unsqueeze(1), write)], 2)
        return state_after, looked_at


def _mapped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map of each cell, ``(T, N, B, I)`` to ``(T, N, B, M)``."""
    steps, count, batch, _ = x.shape
    rows = x.transpose(0, 1).reshape(count, steps * batch, -1)
    return torch.baddbmm(bias, rows, weight).view(count, steps, batch, -1).transpose(0, 1)


def _per_cell(slots: Tensor, weight: Tensor) -> Tensor:
    """A linear map of each cell on slots, ``(N, B, k, D)`` to ``(N, B, k, M)``."""
    return torch.bmm(slots.flatten(1, 2), weight).view(*slots.shape[:3], -1)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Entries ``index (N, B, k)`` of ``values (N, B, S, M)``."""
    return values.gather(2, index.unsqueeze(-1).expand(*index.shape, values.shape[-1]))


def draw(tasks: list[MultiQueryRecall]) -> tuple[Tensor, Tensor]:
    """Inputs ``(T, N, B, I)`` and targets ``(T, N, B)``, another stream of sequences for every cell."""
    batches = [task.sample() for task in tasks]
    return torch.stack([b.x for b in batches], 1), torch.stack([b.target for b in batches], 1)


def accuracies(cells: Cells, options: argparse.Namespace, length: int) -> list[float]:
    """Share of right answers of each cell on fresh sequences."""
    distance = options.distance
    tasks = [
        MultiQueryRecall(length, options.sequences, options.pairs, min_distance=distance, seed=10_000 + seed)
        for seed in range(options.seeds)
    ]
    x, target = draw(tasks)
    with torch.no_grad():
        right = (cells.run(x).argmax(-1) == target) & (target != IGNORE)
    return (right.sum((0, 2)) / (target != IGNORE).sum((0, 2))).tolist()


def train(variant: Variant, options: argparse.Namespace) -> dict:
    """Train cells of a variant and score them at the length they were trained to and at 512."""
    torch.manual_seed(0)
    pairs, distance = options.pairs, options.distance
    shortest = 4 * pairs + distance
    longest = round(options.stretch * shortest)
    tasks = [
        MultiQueryRecall(shortest, options.batch, pairs, min_distance=distance, seed=seed)
        for seed in range(options.seeds)
    ]
    cells = Cells(variant, options.seeds, tasks[0].input_size, tasks[0].output_size)
    parameters = list(cells.parameters.values())
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    began, losses = time.perf_counter(), []
    for update in range(options.updates):
        share = update / options.updates
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - 0.9 * share)
        for task in tasks:
            task.length = round(shortest + (longest - shortest) * min(1.0, share / 0.8))
        x, target = draw(tasks)
        logits = cells.run(x)
        loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=IGNORE, reduction="none")
        loss = loss.view(target.shape).sum((0, 2)) / (options.batch * pairs)  # (N,)
        loss.sum().backward()
        norms = torch.stack([p.grad.flatten(1).square().sum(1) for p in parameters if p.grad is not None]).sum(0).sqrt()
        for p in parameters:
            if p.grad is not None:
                p.grad *= (1 / norms).clamp(max=1.0).view(-1, *[1] * (p.dim() - 1))
        optimizer.step()
        optimizer.zero_grad()
        if update % 100 == 99:
            losses.append(loss.tolist())
    scored = {str(length): accuracies(cells, options, length) for length in sorted({longest, 512})}
    return {"losses": losses, "accuracy": scored, "longest": longest, "seconds": time.perf_counter() - began}


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--distance", type=int, default=8, help="steps between pairs and questions")
    parser.add_argument("--stretch", type=float, default=2.5, help="longest over shortest sequence trained on")
    parser.add_argument("--sequences", type=int, default=100, help="fresh ones for each seed and length")
    parser.add_argument("--variants", nargs="+", choices=variants(4))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows: list[dict] = []
    for name, variant in variants(options.pairs).items():
        if options.variants and name not in options.variants:
            continue
        row = {"variant": name, "pairs": options.pairs, "updates": options.updates, **train(variant, options)}
        rows.append(row | {"built": asdict(variant), "commit": commit})
        print(name, {length: [round(a, 3) for a in each] for length, each in row["accuracy"].items()}, flush=True)
        if options.out:
            options.out.write_text(json.dumps({"machine": describe_environment(), "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
