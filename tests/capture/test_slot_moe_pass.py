"""The fused pass of SlotMoECell against BPTT and against the general capture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import gradients_of
from torch import Tensor

from sparse_rtrl import RTRL, NonFiniteError, SlotMoECell
from sparse_rtrl.capture.fused import FusedCapture
from sparse_rtrl.ops import dispatch
from sparse_rtrl.training.gradient_method import unroll

pytestmark = pytest.mark.skipif(bool(dispatch.compiled_problem), reason="the compiled operations were not built")

SIZES = {
    "odd": {"slot_size": 5, "num_slots": 6, "num_experts": 8, "top_k": 2, "read_slots": 2, "write_slots": 2},
    "heads": {"slot_size": 12, "num_slots": 4, "num_experts": 3, "top_k": 1, "read_slots": 2, "write_slots": 1},
    "wide": {"slot_size": 33, "num_slots": 3, "num_experts": 3, "top_k": 3, "read_slots": 1, "write_slots": 3},
    "least used": {
        "slot_size": 8,
        "num_slots": 5,
        "num_experts": 4,
        "top_k": 2,
        "read_slots": 5,
        "write_slots": 1,
        "write_to": "least_used",
    },
    "softmax": {
        "slot_size": 6,
        "num_slots": 5,
        "num_experts": 3,
        "top_k": 2,
        "read_slots": 3,
        "write_slots": 2,
        "read_weights": "softmax",
    },
    "single": {"slot_size": 16, "num_slots": 1, "num_experts": 1, "top_k": 1, "read_slots": 1, "write_slots": 1},
}
HEADS = {"odd": 1, "heads": 4, "wide": 3, "least used": 4, "softmax": 3, "single": 2}


def make_cell(name: str, dtype: torch.dtype = torch.float64) -> SlotMoECell:
    torch.manual_seed(0)
    return SlotMoECell(input_size=3, output_size=2, num_heads=HEADS[name], **SIZES[name]).to(dtype)


def problem(steps: int, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and cotangents of the outputs."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(steps, batch, 3, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(steps, batch, 2, generator=generator, dtype=torch.float64).to(dtype),
    )


def learn(learner: RTRL, x: Tensor, c: Tensor, segments: list[int]) -> Tensor:
    """Outputs; the gradient is in ``.grad`` afterwards."""
    outputs = []
    for xs, cs in zip(x.split(segments), c.split(segments), strict=True):
        out = learner.unroll(xs) if len(xs) > 1 else learner(xs[0]).unsqueeze(0)
        (out * cs).sum().backward()
        outputs.append(out.detach())
    learner.flush()
    return torch.cat(outputs)


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    scale = 1e-3 * float(torch.cat([g.flatten() for g in expected.values()]).norm())
    return max(float((found[n] - g).norm()) / max(float(g.norm()), scale) for n, g in expected.items())


@pytest.mark.parametrize("name", SIZES)
def test_evaluation_gives_the_outputs_of_the_cell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, (x, _) = make_cell(name), problem(11, 3)
    expected, end = unroll(cell, x, cell.initial_state(3))
    monkeypatch.setattr("sparse_rtrl.cells.slot_moe_pass._TOGETHER", 3 * 4)  # parts of 4, 4 and 3 steps
    calls = []
    run = dispatch.slot_moe_forward
    monkeypatch.setattr(
        dispatch, "slot_moe_forward", lambda *arguments: calls.append(len(arguments[1])) or run(*arguments)
    )
    with torch.no_grad():
        found, state = unroll(cell, x, cell.initial_state(3))
    evaluation = RTRL(cell, batch_size=3).evaluate()
    calls_of_unroll, calls[:] = list(calls), []
    parts = [evaluation(x[0]).unsqueeze(0), evaluation.unroll(x[1:])]
    assert calls_of_unroll == [4, 4, 3] and calls == [1, 4, 4, 2]
    for outputs, after in ((found, state), (torch.cat(parts), evaluation.state)):
        torch.testing.assert_close(outputs, expected.detach(), rtol=0, atol=1e-14)
        torch.testing.assert_close(after, end.detach(), rtol=0, atol=1e-14)
    torch.nn.utils.parametrizations.weight_norm(cell.control)
    cell.slot_table.data.add_(0.5)
    with torch.no_grad():
        found, _ = unroll(cell, x, cell.initial_state(3))
    torch.testing.assert_close(found, unroll(cell, x, cell.initial_state(3))[0].detach(), rtol=0, atol=1e-14)
    calls.clear()
    cell.experts.register_forward_hook(lambda module, inputs, output: 2 * output)
    with torch.no_grad():
        hooked, _ = unroll(cell, x, cell.initial_state(3))
    assert not calls and float((hooked - found).abs().max()) > 1e-2  # a cell that runs other code runs it


@pytest.mark.parametrize("commit_every", [1, 7, 64])
@pytest.mark.parametrize("name", SIZES)
def test_gradient_is_that_of_bptt(name: str, commit_every: int) -> None:
    segments = [1, 3, 1, 9, 2, 1, 1, 6]
    cell, (x, c) = make_cell(name), problem(sum(segments), 3)
    outputs, _ = unroll(cell, x, cell.initial_state(3))
    (outputs * c).sum().backward()
    expected = gradients_of(cell)
    cell.zero_grad()
    learner = RTRL(cell, batch_size=3, commit_every=commit_every)
    assert learner._engine.fused is not None
    found = learn(learner, x, c, segments)
    torch.testing.assert_close(found, outputs.detach(), rtol=0, atol=1e-14)
    assert error(gradients_of(cell), expected) <= 1e-12
    cell.zero_grad()
    truncated = torch.cat([unroll(cell, xs, cell.initial_state(3))[0] for xs in x.split(segments)])
    (truncated * c).sum().backward()
    assert error(gradients_of(cell), expected) > 1e-2


@pytest.mark.parametrize("catch_up", ["eager", "replay", "product"])
def test_agrees_with_the_general_capture_while_parameters_move(catch_up: str) -> None:
    """Online updates inside a window: every step must be kept with the weights it was run with."""
    x, c = problem(40, 2)
    segments = [1] * 6 + [2, 5, 1, 1, 1, 3] + [1] * 21
    runs = []
    for backend in ("auto", "reference"):
        cell = make_cell("odd")
        learner = RTRL(cell, batch_size=2, commit_every=5, buffer=4, catch_up=catch_up, backend=backend)
        assert (learner._engine.fused is None) == (backend == "reference")
        optimizer = torch.optim.SGD(cell.parameters(), lr=1e-2)
        learner.attach(optimizer)
        for number, (xs, cs) in enumerate(zip(x.split(segments), c.split(segments), strict=True)):
            out = learner.unroll(xs)
            if number % 3:
                (out * cs).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            if number == 20:
                learner.reset(torch.tensor([True, False]))
        runs.append((gradients_of(cell), [p.detach().clone() for p in cell.parameters()], learner.influence(), learner))
    (_, fused, influence, learner), (_, general, expected, _) = runs
    for a, b in zip(fused, general, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for parameter, matrix in influence.items():
        torch.testing.assert_close(matrix, expected[parameter], rtol=1e-11, atol=1e-12)
        assert float(matrix.abs().max()) > 1e-3
    assert catch_up == "eager" or learner.events["wakes"] > 0


def test_kept_weights_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above sees it if steps were taken back with newer weights."""
    monkeypatch.setattr(FusedCapture, "_copies", lambda self, weights: weights)
    with pytest.raises(AssertionError):
        test_agrees_with_the_general_capture_while_parameters_move("eager")


def test_float32_has_the_error_of_bptt() -> None:
    segments = [1, 8, 16, 3, 30]
    x, c = problem(sum(segments), 4)
    cell = make_cell("odd")
    cell.load_state_dict(make_cell("odd", torch.float32).state_dict())
    (unroll(cell, x.float().double(), cell.initial_state(4))[0] * c.float().double()).sum().backward()
    truth = gradients_of(cell)
    single = make_cell("odd", torch.float32)
    (unroll(single, x.float(), single.initial_state(4))[0] * c.float()).sum().backward()
    of_bptt = error({n: g.double() for n, g in gradients_of(single).items()}, truth)
    single.zero_grad()
    learn(RTRL(single, batch_size=4, commit_every=8), x.float(), c.float(), segments)
    assert error({n: g.double() for n, g in gradients_of(single).items()}, truth) <= 2 * of_bptt


@pytest.mark.parametrize("cpu", ["generic", "avx2"])
def test_other_instruction_sets(cpu: str) -> None:
    if cpu == "avx2" and "avx2" not in open("/proc/cpuinfo").read():
        pytest.skip("the processor lacks AVX2")
    code = "import test_slot_moe_pass as t\nfor n in t.SIZES: t.test_gradient_is_that_of_bptt(n, 7)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SPARSE_RTRL_CPU": cpu, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        cwd=Path(__file__).parent,
    )
    assert run.returncode == 0, run.stderr.decode()


def test_reads_that_change_while_a_window_is_open() -> None:
    """A step goes back through the read weights that it was run with, also where they are changed behind it."""
    x, c = problem(6, 2)
    cell = make_cell("softmax")
    kinds = ["softmax"] * 3 + ["sigmoid"] * 3
    state, losses = cell.initial_state(2), []
    for x_t, c_t, kind in zip(x, c, kinds, strict=True):
        cell.read_weights = kind
        output, _, state = cell(x_t, state)
        losses.append((output * c_t).sum())
    torch.stack(losses).sum().backward()
    expected = gradients_of(cell)
    cell.zero_grad()
    cell.read_weights = "softmax"
    learner = RTRL(cell, batch_size=2, commit_every=8)
    for x_t, c_t, kind in zip(x, c, kinds, strict=True):
        cell.read_weights = kind
        (learner(x_t) * c_t).sum().backward()
    learner.flush()
    assert error(gradients_of(cell), expected) <= 1e-12


def test_cells_that_run_their_own_code() -> None:
    class Changed(SlotMoECell):
        pass

    options = {"input_size": 3, "output_size": 2, "num_heads": 1, **SIZES["odd"]}
    assert RTRL(Changed(**options), batch_size=1)._engine.fused is None
    frozen = SlotMoECell(**options)
    frozen.control.bias.requires_grad_(False)
    assert RTRL(frozen, batch_size=1)._engine.fused is None
    hooked = SlotMoECell(**options)
    learner = RTRL(hooked, batch_size=1, commit_every=4)
    calls = []
    learner(torch.randn(1, 3))
    handle = hooked.control.register_forward_hook(lambda *_: calls.append(1))
    learner(torch.randn(1, 3)).sum().backward()  # a window of another kind begins
    assert calls
    handle.remove()
    calls.clear()
    update = hooked.update
    hooked.update = lambda *arguments: (calls.append(1), update(*arguments))[1]
    learner(torch.randn(1, 3)).sum().backward()
    assert calls
    del hooked.update
    calls.clear()
    learner(torch.randn(1, 3)).sum().backward()
    assert not calls


def changes(name: str, cell: SlotMoECell, optimizer: torch.optim.Optimizer, number: int) -> None:
    """What may happen to a cell between two steps."""
    if name == "fused optimizer":
        optimizer.step()
    elif name == "data":
        cell.control.weight.data.mul_(0.9)
    elif name == "frozen for a while" and number in (3, 6):
        cell.control.weight.requires_grad_(number == 6)
    elif name == "another forward" and number == 3:
        forward = cell.control.forward
        cell.control.forward = lambda x: 0.5 * forward(x)
    elif name == "more experts" and number == 3:
        cell.top_k = 3
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "name", ["fused optimizer", "data", "frozen for a while", "another forward", "more experts", "one input buffer"]
)
def test_follows_the_general_capture_whatever_happens(name: str) -> None:
    x, c = problem(12, 2)
    found = []
    for backend in ("auto", "reference"):
        cell, buffer = make_cell("odd"), torch.empty(2, 3, dtype=torch.float64)
        learner = RTRL(cell, batch_size=2, commit_every=3, backend=backend, catch_up="eager")
        optimizer = torch.optim.Adam(cell.parameters(), lr=0.05, fused=True)
        for number in range(12):
            changes(name, cell, optimizer, number)
            out = learner(buffer.copy_(x[number]) if name == "one input buffer" else x[number])
            (out * c[number]).sum().backward()
        found.append((gradients_of(cell), learner.influence()))
    (fused, influence), (general, expected) = found
    assert error(fused, general) <= 1e-11
    assert all(float((influence[n] - P).abs().max()) <= 1e-10 for n, P in expected.items())


def test_a_state_of_other_sizes_is_refused() -> None:
    learner, other = (RTRL(make_cell(name), batch_size=2, commit_every=9) for name in ("heads", "heads"))
    learner(problem(1, 2)[0][0])
    state = learner.state_dict()
    state["influence"]["window"][0]["sizes"] = (2, *state["influence"]["window"][0]["sizes"][1:])
    other_weights = make_cell("heads")
    other_weights.read_weights = "softmax"
    with pytest.raises(ValueError, match=r"options \('softmax',\), got \('sigmoid',\)"):
        RTRL(other_weights, batch_size=2, commit_every=9).load_state_dict(learner.state_dict())
    with pytest.raises(ValueError, match="num_heads"):
        other.load_state_dict(state)


def test_nan_of_an_expert_that_would_not_be_chosen() -> None:
    cell = make_cell("odd")
    with torch.no_grad():
        cell.experts.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="experts"):
        RTRL(cell, batch_size=2).unroll(problem(4, 2)[0])


@pytest.mark.parametrize("parameter", ["control.weight", "experts.bias"])
def test_names_what_is_not_finite(parameter: str) -> None:
    cell = make_cell("odd")
    learner = RTRL(cell, batch_size=2)
    x, _ = problem(4, 2)
    learner.unroll(x)
    before = learner.state.clone()
    with torch.no_grad():
        cell.get_parameter(parameter).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=parameter.replace(".", r"\.")):
        learner.unroll(x)
    assert torch.equal(learner.state, before)
    with torch.no_grad():
        cell.get_parameter(parameter).fill_(0.1)
    x[2, 1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"step 6.*new state"):
        learner.unroll(x)


def test_operations_refuse_what_does_not_fit() -> None:
    cell = make_cell("odd")
    learner = RTRL(cell, batch_size=2)
    learner.unroll(problem(3, 2)[0])
    (steps,) = learner._engine.influence.window
    v, core, experts = torch.zeros(2, 30).double(), learner._engine.influence.core, learner._engine.influence.experts
    g = torch.zeros(core.shape[2]).double(), torch.zeros(8, experts.shape[2]).double()
    arguments = [[steps.inputs], [steps.saved], [steps.index], steps.weights, steps.of.columns, *steps.of.sizes[:3]]
    dispatch.slot_moe_pull_back_(v, *g, None, *arguments)
    for place, bad in (
        (0, [steps.inputs[:2]]),
        (0, [steps.inputs] * 2),
        (1, [steps.saved[..., :-1]]),
        (1, [steps.saved.float()]),
        (2, [steps.index + 8]),
        (3, steps.weights[:-1]),
        (4, [10**6, *steps.of.columns[1:]]),
    ):
        changed = [*arguments[:place], bad, *arguments[place + 1 :]]
        with pytest.raises((RuntimeError, ValueError, IndexError), match="must"):
            dispatch.slot_moe_pull_back_(v, *g, None, *changed)
    with pytest.raises(IndexError, match="rows must"):
        phi = torch.zeros(2, 1, 30).double()
        dispatch.slot_moe_commit_(core, experts, phi, torch.tensor([[30], [0]]), *arguments)
    for name, call in (
        ("slot_moe_pull_back_", (v, *g, None, *arguments)),
        ("slot_moe_transfer_", (torch.zeros(2, 4, 30).double(), *arguments)),
    ):
        torch.library.opcheck(getattr(torch.ops.sparse_rtrl, name).default, call)
    forward = (learner.state, torch.zeros(3, 2, 10).double(), steps.weights, *steps.of.sizes)
    torch.library.opcheck(torch.ops.sparse_rtrl.slot_moe_forward.default, forward)
