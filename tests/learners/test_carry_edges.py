"""Where a stream begins, what enters it, and what changes in the middle: exact, or refused by name."""

import copy
import pickle
import warnings

import pytest
import torch
from carry_oracle import EXACT, F64
from oracle import worst_error
from torch import nn
from torch.nn.utils import prune

from sparse_rtrl import Carry, ContractError
from sparse_rtrl.errors import DisagreementError

T, B, H = 8, 3, 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gradients(module):
    out = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return {n: torch.view_as_real(g) if g.is_complex() else g for n, g in out.items()}


def loss_of(state):
    leaves = torch.utils._pytree.tree_leaves(state)
    return sum((s.abs() ** 2).sum() for s in leaves)


def run(module, step, x, first, end_segment, between=lambda t, h: h, segment=1):
    """A loop in segments; ``between`` acts on the state that the next segment gets."""
    h = first() if first is not None else None
    if h is not None:
        h = end_segment(h, None)
    for t in range(0, len(x), segment):
        loss = 0.0
        for s in range(t, min(t + segment, len(x))):
            h = step(module, x[s], h, s)
            loss = loss + loss_of(h)
        h = between(t, end_segment(h, loss))


def bptt(module, step, x, first, between=lambda t, h: h):
    total = [0.0]

    def stay(h, loss):
        total[0] = total[0] + (0.0 if loss is None else loss)
        return h

    run(module, step, x, first, stay, between)
    total[0].backward()
    return gradients(module)


def carried(module, step, x, first, between=lambda t, h: h, segment=1, carry=None, **options):
    carry = Carry(module, **{"verify": "always", **options}) if carry is None else carry

    def end(h, loss):
        h = carry(h)
        if loss is not None:
            loss.backward()
        return h

    run(module, step, x, first, end, between, segment)
    return gradients(module)


def exact(module, step, x, first, between=lambda t, h: h, segment=1, **options):
    expected = bptt(module, step, x, first, between)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not captured as factors.*")
        return worst_error(carried(module, step, x, first, between, segment, **options), expected) <= EXACT


def call(module, x, h, t):
    return module(x, h)


def inputs(size=2, steps=T):
    return torch.randn(steps, B, size, **F64)


class FirstState(nn.Module):
    """A cell with a trained first state, and an encoder of one."""

    def __init__(self):
        super().__init__()
        self.cell, self.h0, self.encoder = (
            nn.GRUCell(2, H, **F64),
            nn.Parameter(torch.randn(H, **F64)),
            nn.Linear(4, H, **F64),
        )

    def forward(self, x, h):
        return self.cell(x, h)

    def first(self):
        return self.h0.expand(B, H)

    def encoded(self, context):
        return torch.tanh(self.encoder(context))


# First states.


@pytest.mark.parametrize("segment", [1, 3])
@pytest.mark.parametrize("commit_every", ["auto", 1, 3])
def test_a_loop_that_starts_from_none(segment, commit_every):
    assert exact(nn.GRUCell(2, H, **F64), call, inputs(), None, segment=segment, commit_every=commit_every)


@pytest.mark.parametrize("capture", ["auto", "dense"])
@pytest.mark.parametrize("kind", ["parameter", "encoder"])
def test_first_states_with_a_graph(kind, capture):
    m, context = FirstState(), torch.randn(B, 4, **F64)
    first = m.first if kind == "parameter" else lambda: m.encoded(context)
    assert exact(m, call, inputs(), first, capture=capture)


@pytest.mark.parametrize("reset", [False, True])
def test_streams_that_start_anew_from_a_trained_state(reset):
    m, done = FirstState(), torch.tensor([True, False, True]).unsqueeze(1)
    carry = Carry(m, verify="always")

    def between(t, h):
        return torch.where(done, m.h0, h) if t in (2, 5) else h

    def with_reset(t, h):
        if reset and t in (2, 5):
            carry.reset(done[:, 0])
        return between(t, h)

    x = inputs()
    expected = bptt(m, call, x, m.first, between)
    assert worst_error(carried(m, call, x, m.first, with_reset, carry=carry), expected) <= EXACT


def test_a_reset_of_all_streams_lets_a_trained_state_enter_again():
    m, x = FirstState(), inputs()
    expected = {n: 2 * g for n, g in bptt(m, call, x, m.first).items()}
    carry = Carry(m)
    found = carried(m, call, x, m.first, carry=carry)
    carry.reset()
    again = carried(m, call, x, m.first, carry=carry)
    assert worst_error({n: found[n] + again[n] for n in found}, expected) <= EXACT


@pytest.mark.parametrize("method", ["snap1", "rflo", "uoro"])
def test_approximations_hold_the_influence_of_the_first_state(method):
    m = FirstState()
    carry = Carry(m, method=method)
    h = carry(m.first())
    o = m(inputs()[0], h)
    carry(o)
    o.sum().backward()
    assert m.h0.grad is not None and bool(m.h0.grad.any())


def test_truncation_drops_the_graph_of_the_first_state():
    m = FirstState()
    carry = Carry(m, method="truncated")
    h = carry(m.first())
    m(inputs()[0], h).sum().backward()
    assert m.h0.grad is None


def test_trainable_tensors_from_outside_are_refused_at_the_start():
    carry, outside = Carry(nn.GRUCell(2, H, **F64)), nn.Parameter(torch.randn(B, H, **F64))
    with pytest.raises(RuntimeError, match=r"shape \(3, 5\) reaches the state but is no parameter of the module"):
        carry(torch.tanh(outside))
    carry(torch.zeros(B, H, **F64))  # nothing was lost


def test_a_state_of_an_older_segment_is_named():
    m, x = nn.GRUCell(2, H, **F64), inputs()
    carry = Carry(m)
    old = carry(torch.zeros(B, H, **F64))
    h = carry(m(x[0], old))
    with pytest.raises(RuntimeError, match="returned earlier than the last one"):
        carry(m(x[1], h) + old)


# States.


def test_a_state_of_one_number():
    class Leak(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn((), **F64)), nn.Parameter(torch.randn(3, **F64))

        def forward(self, x, h):
            return torch.tanh(self.a * h + x @ self.b)

    assert exact(Leak(), call, inputs(3), lambda: torch.zeros(B, **F64))


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_the_carried_state_may_be_written_in_place(cell):
    m = cell(2, H, **F64)
    zeros = torch.zeros(B, H, **F64)
    done = torch.tensor([True, False, True])

    def out_of_place(t, h):
        one = lambda s: torch.where(done.unsqueeze(1), 0.0, s) if t in (2, 3) else s  # noqa: E731
        return tuple(one(s) for s in h) if isinstance(h, tuple) else one(h)

    def in_place(t, h):
        if t in (2, 3):
            for s in h if isinstance(h, tuple) else (h,):
                s[done] = 0
        return h

    first = (lambda: (zeros, zeros)) if cell is nn.LSTMCell else (lambda: zeros)
    x = inputs()
    expected = bptt(m, call, x, first, out_of_place)
    assert worst_error(carried(m, call, x, first, in_place), expected) <= EXACT


def test_parts_of_other_precision_keep_that_of_the_finest():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.a = nn.GRUCell(2, H, **F64), nn.Parameter(torch.tensor(0.5, **F64))

        def forward(self, x, state):
            count, h = state
            return count + 1, self.cell(x, h) * self.a

    carry = Carry(Two())
    first, _ = carry((torch.zeros(B, 1), torch.zeros(B, H, **F64)))
    assert first.dtype == torch.float32
    assert carry._entry.dtype == torch.float64
    assert exact(Two(), call, inputs(), lambda: (torch.zeros(B, 1), torch.zeros(B, H, **F64)))


@pytest.mark.parametrize("state", ["pairs", "complex"])
@pytest.mark.parametrize("form", ["product", "element-wise", "polar"])
def test_complex_parameters_and_states(state, form):
    class Recurrence(nn.Module):
        def __init__(self):
            super().__init__()
            self.B = nn.Parameter(torch.randn(4, 2, dtype=torch.complex128))
            self.lam = nn.Parameter(0.5 * torch.randn(4, dtype=torch.complex128))
            self.radius, self.angle = (nn.Parameter(torch.randn(4, **F64)) for _ in range(2))

        def forward(self, x, h):
            h = torch.view_as_complex(h) if state == "pairs" else h
            lam = self.lam if form != "polar" else torch.polar(torch.sigmoid(self.radius), self.angle)
            drive = x.to(self.B.dtype) @ self.B.T if form == "product" else self.B[:, 0] * x[:, :1]
            h = lam * h + drive
            return torch.view_as_real(h) if state == "pairs" else h

    m = Recurrence()
    shape, dtype = ((B, 4, 2), torch.float64) if state == "pairs" else ((B, 4), torch.complex128)
    assert exact(m, call, inputs(), lambda: torch.zeros(shape, dtype=dtype))
    carry = Carry(m)
    carry(m(inputs()[0], carry(torch.zeros(shape, dtype=dtype))))
    assert carry.influence()["B"].shape == (B, 8, 4, 2) and carry.influence()["B"].is_complex()


# Parameters that change without a bump of their version counter, and memory that is used again.


@pytest.mark.parametrize("commit_every", [1, 4])
@pytest.mark.parametrize("update", ["fused", "data"])
@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell])
def test_updates_that_bump_no_version_counter(update, commit_every, cell):
    def run(silent):
        torch.manual_seed(0)
        m, x = cell(3, 4, **F64), inputs(3, 14)
        optimizer = torch.optim.Adam(m.parameters(), 0.02, fused=silent, foreach=False)
        carry, found = Carry(m, commit_every=commit_every), []
        zeros = torch.zeros(B, 4, **F64)
        h = carry((zeros, zeros) if cell is nn.LSTMCell else zeros)
        for x_t in x:
            h = m(x_t, h)
            loss = loss_of(h)
            h = carry(h)
            loss.backward()
            found.append(m.weight_hh.grad.clone())
            if update == "fused":
                optimizer.step()
            else:
                for p in m.parameters():
                    (p.data if silent else p.detach()).add_(p.grad, alpha=-0.02)
            m.zero_grad()
        return {str(t): g for t, g in enumerate(found)}

    assert worst_error(run(True), run(False)) <= 1e-10


def test_a_silent_update_between_backward_and_carry_is_refused():
    m, x = nn.GRUCell(2, H, **F64), inputs()
    optimizer, carry = torch.optim.Adam(m.parameters(), fused=True), Carry(m)
    h = carry(torch.zeros(B, H, **F64))
    for t in range(2):
        h = m(x[t], h)
        loss_of(h).backward(retain_graph=True)
        if t == 1:
            optimizer.step()
            with pytest.raises(RuntimeError, match="weight_ih changed before carry was called"):
                carry(h)
            break
        h = carry(h)  # late, but nothing has changed


@pytest.mark.parametrize("module", ["chain", "general"])
def test_inputs_may_be_overwritten_before_the_segment_is_committed(module):
    class General(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.u = nn.Linear(2, H, **F64), nn.Linear(H, H, **F64)

        def forward(self, x, h):
            return torch.atan(self.w(x) + self.u(h))

    m, x = General() if module == "general" else nn.RNNCell(2, H, **F64), inputs()
    expected = bptt(m, call, x, lambda: torch.zeros(B, H, **F64))
    carry, buffer = Carry(m, commit_every=4), torch.empty(B, 2, **F64)
    h = carry(torch.zeros(B, H, **F64))
    for x_t in x:
        h = m(buffer.copy_(x_t), h)
        loss = loss_of(h)
        h = carry(h)
        loss.backward()
        buffer.fill_(float("nan"))
    assert worst_error(gradients(m), expected) <= EXACT


# Rows.


def test_rows_sorted_and_put_back_are_exact():
    def step(m, x, h, t):
        order = torch.arange(B) if t < 2 else torch.tensor([2, 0, 1])
        return m(x[order], h[order])[order.argsort()]

    assert exact(nn.GRUCell(2, H, **F64), step, inputs(), lambda: torch.zeros(B, H, **F64), verify="never")


def reorder(m, x, h, t):
    return m(x, h[torch.arange(B) if t < 3 else torch.tensor([2, 0, 1])])


def normalise(m, x, h, t):
    return m(x, h if t < 3 else h - h.mean(0))


def couple(m, x, h, t):
    mixing = torch.eye(B, **F64) if t < 3 else torch.eye(B, **F64).roll(1, 0)
    return m(x, mixing @ h)


def roll_by_slices(m, x, h, t):
    k = 0 if t < 3 else 1
    return m(x, torch.cat([h[k:], h[:k]]))


def softmax_over_rows(m, x, h, t):
    return m(x, h.softmax(1 if t < 3 else 0))


@pytest.mark.parametrize("step", [reorder, normalise, couple, roll_by_slices, softmax_over_rows])
def test_rows_that_influence_each_other_later_are_refused(step):
    m = nn.GRUCell(2, H, **F64)
    with pytest.raises(ContractError, match=r"streams of the batch influence each other"):
        carried(m, step, inputs(), lambda: torch.zeros(B, H, **F64), verify="never")


def test_the_message_names_what_reorders():
    m = nn.GRUCell(2, H, **F64)
    with pytest.raises(ContractError, match="order"):
        carried(m, reorder, inputs(), lambda: torch.zeros(B, H, **F64), verify="never")


def test_float32_inside_a_float64_module_is_no_coupling():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.u = nn.Linear(H, H), nn.Linear(2, H, **F64)

        def forward(self, x, h):
            return torch.atan(self.w(h.float()).double() + self.u(x))

    m, x = Mixed(), inputs()
    expected = bptt(m, call, x, lambda: torch.zeros(B, H, **F64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert worst_error(carried(m, call, x, lambda: torch.zeros(B, H, **F64)), expected) <= 1e-5


def test_weak_coupling_in_float32_is_refused():
    class Weak(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.rec = nn.Linear(2, H), nn.Linear(H, H)

        def forward(self, x, h):
            return torch.tanh(self.lin(x) + self.rec(h) * (1 + 1e-6 * h.roll(1, 0).sum(1, keepdim=True)))

    with pytest.raises(ContractError, match="influence each other"):
        carried(Weak(), call, torch.randn(T, B, 2), lambda: torch.zeros(B, H), verify="never")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_checked_too(dtype):
    m = nn.RNNCell(2, H, dtype=dtype)
    first = lambda: torch.zeros(B, H, dtype=dtype)  # noqa: E731
    x = inputs().to(dtype)
    carried(m, call, x, first)  # rounding is no coupling
    with pytest.raises(ContractError, match="influence each other"):
        carried(m, lambda m, x, h, t: torch.tanh(m(x, h) + (h.mean(0) if t > 2 else 0)), x, first, verify="never")
    with pytest.raises(ContractError, match="not linear"):
        carried(m, hooked(lambda g: g.clamp(-1e-2, 1e-2), "general", 3), x, first, verify="never")


def test_activation_checkpoints():
    def step(m, x, h, t):
        return torch.utils.checkpoint.checkpoint(m, x, h, use_reentrant=False)

    assert exact(nn.GRUCell(2, H, **F64), step, inputs(), lambda: torch.zeros(B, H, **F64))


# Hooks and backward passes.


def hooked(hook, module, since=0):
    def step(m, x, h, t):
        h = m(x, h)
        h = h * 1.0 if module == "general" else h
        if t >= since and h.requires_grad:
            h.register_hook(hook)
        return torch.atan(h) if module == "general" else h

    return step


@pytest.mark.parametrize("since", [0, 3])
@pytest.mark.parametrize("module", ["chain", "general"])
def test_linear_hooks_are_exact(module, since):
    m = nn.GRUCell(2, H, **F64)
    step = hooked(lambda g: 0.5 * g, module, since)
    assert exact(m, step, inputs(), lambda: torch.zeros(B, H, **F64), verify="never")


@pytest.mark.parametrize("since", [0, 3])
@pytest.mark.parametrize("module", ["chain", "general"])
@pytest.mark.parametrize("hook", [lambda g: g.clamp(-1, 1), lambda g: g.clamp(-50, 50), lambda g: g / (1 + g.norm())])
def test_hooks_that_are_not_linear_are_refused(hook, module, since):
    m = nn.GRUCell(2, H, **F64)
    with pytest.raises(ContractError, match="not linear"):
        carried(m, hooked(hook, module, since), inputs(), lambda: torch.zeros(B, H, **F64), verify="never")


def test_custom_backward_passes_that_clip_are_refused():
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g.clamp(-0.1, 0.1)

    m = nn.GRUCell(2, H, **F64)
    with pytest.raises(ContractError, match="not linear"):
        carried(m, lambda m, x, h, t: Clip.apply(m(x, h)), inputs(), lambda: torch.zeros(B, H, **F64), verify="never")


@pytest.mark.parametrize("since", [0, 3])
def test_hooks_on_parameters_see_the_whole_gradient_once(since):
    m, x = nn.GRUCell(2, H, **F64), inputs()
    plain = bptt(m, call, x, lambda: torch.zeros(B, H, **F64))

    def between(t, h):
        if t == since:
            m.weight_hh.register_hook(lambda g: 3 * g)
        return h

    carry = Carry(m, verify="always")
    h = carry(torch.zeros(B, H, **F64))
    for t in range(T):
        between(t, h)
        h = m(x[t], h)
        loss = loss_of(h)
        h = carry(h)
        if t < since:
            loss.backward()
            m.zero_grad()
        else:
            loss.backward()
    found = gradients(m)
    later = bptt_of_losses(m, x, since)
    assert plain.keys() == found.keys()
    assert worst_error(found, later) <= EXACT


def bptt_of_losses(m, x, since):
    h, loss = torch.zeros(B, H, **F64), 0.0
    for t in range(T):
        h = m(x[t], h)
        loss = loss + (loss_of(h) if t >= since else 0.0)
    loss.backward()  # the hook is still there
    return gradients(m)


# A second state inside the module.


class Inner(nn.Module):
    """Keeps a trace of its own, which the loop detaches after every segment."""

    def __init__(self, place="attribute"):
        super().__init__()
        self.cell, self.decay = nn.GRUCell(2, H, **F64), nn.Parameter(torch.tensor(0.5, **F64))
        self.place, self.trace, self.traces, self.box = place, None, {}, Box()

    def get(self):
        return {"attribute": self.trace, "dict": self.traces.get("one"), "object": self.box.trace}[self.place]

    def put(self, trace):
        if self.place == "attribute":
            self.trace = trace
        elif self.place == "dict":
            self.traces["one"] = trace
        else:
            self.box.trace = trace

    def forward(self, x, h):
        before = 0.0 if self.get() is None else self.get()
        self.put(self.decay * before + (h if self.place == "attribute" else torch.tanh(self.decay * x[:, :1])))
        return torch.tanh(self.cell(x, h) + self.get())


class Box:
    trace = None


@pytest.mark.parametrize("place", ["attribute", "dict", "object"])
def test_a_second_state_that_the_loop_detaches_is_refused(place):
    m = Inner(place)
    where = {"attribute": r"module\.trace", "dict": r"module\.traces\['one'\]", "object": r"module\.box\.trace"}[place]

    def detach(t, h):
        m.put(m.get().detach())
        return h

    with pytest.raises(ContractError, match=where + r" holds a tensor .* detached since"):
        carried(m, call, inputs(), lambda: torch.zeros(B, H, **F64), detach, verify="never")


def test_a_second_state_that_stays_attached_is_refused():
    with pytest.raises(RuntimeError, match="returned earlier than the last one"):
        carried(Inner(), call, inputs(), lambda: torch.zeros(B, H, **F64), verify="never")


class Recorder(nn.Module):
    """Keeps records that it does not read, and a trace that it detaches itself as backpropagation would see it too."""

    def __init__(self):
        super().__init__()
        self.cell, self.trace, self.seen = nn.GRUCell(2, H, **F64), None, None

    def forward(self, x, h):
        before = 0.0 if self.trace is None else self.trace.detach()
        h = self.cell(x, h + before)
        self.trace, self.seen = 0.5 * torch.tanh(h), {"mean": h.mean(), "rows": h, "weights": h.softmax(1)}
        return h


@pytest.mark.parametrize("drop", [False, True])
def test_records_in_attributes_are_no_state(drop):
    m, x = Recorder(), inputs()

    def between(t, h):
        if drop:
            m.seen = None
        return h

    first = lambda: torch.zeros(B, H, **F64)  # noqa: E731
    expected = bptt(m, call, x, first)
    m.trace = None
    assert worst_error(carried(m, call, x, first, between), expected) <= EXACT
    assert not m._forward_pre_hooks or len(m._forward_pre_hooks) == 1


# Distributed data parallel.


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_distributed_data_parallel(options, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        m, x = nn.GRUCell(2, H, **F64), inputs()
        first = lambda: torch.zeros(B, H, **F64)  # noqa: E731
        expected = bptt(m, call, x, first)
        wrapped = nn.parallel.DistributedDataParallel(m, **options)
        carry = Carry(m, verify="always")
        found = carried(m, lambda _, x_t, h, t: wrapped(x_t, h), x, first, carry=carry)
        assert worst_error(found, expected) <= EXACT
    finally:
        torch.distributed.destroy_process_group()


def test_static_graphs_reduce_the_gradients_of_the_loss(tmp_path):
    """In one process nothing shows in the gradient, so the reduction is watched."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        m, x, reduced = nn.GRUCell(2, H, **F64), inputs(), []

        def watch(_, bucket):
            reduced.extend(g.clone() for g in bucket.gradients())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        wrapped = nn.parallel.DistributedDataParallel(m, static_graph=True)
        wrapped.register_comm_hook(None, watch)
        carry = Carry(m, verify="always")
        h = carry(torch.zeros(B, H, **F64))
        for x_t in x:
            h = wrapped(x_t, h)
            loss = loss_of(h)
            h = carry(h)
            assert not reduced
            loss.backward()
            assert sorted(float(g.sum()) for g in reduced) == sorted(float(p.grad.sum()) for p in m.parameters())
            reduced.clear()
    finally:
        torch.distributed.destroy_process_group()


# Saving, copying.


def test_a_state_from_before_the_first_segment_forgets_everything():
    m, x = nn.GRUCell(2, H, **F64), inputs()
    first = lambda: torch.zeros(B, H, **F64)  # noqa: E731
    expected, carry = bptt(m, call, x, first), Carry(m)
    fresh = carry.state_dict()
    carried(m, call, x, first, carry=carry)
    carry.load_state_dict(fresh)
    assert worst_error(carried(m, call, x, first, carry=carry), expected) <= EXACT


@pytest.mark.parametrize("method", ["exact", "snap1", "rflo", "uoro", "truncated"])
@pytest.mark.parametrize("copied", ["deepcopy", "copy", "pickle", "state_dict"])
@pytest.mark.parametrize("start", ["zeros", "trained"])
def test_copies_go_on_in_mid_stream(copied, method, start):
    m, x = FirstState(), inputs()
    carry = Carry(m, method=method, commit_every=3 if method == "exact" else "auto")
    h = carry(torch.zeros(B, H, **F64) if start == "zeros" else m.first())
    for t in range(4):
        h = carry(m(x[t], h))

    def go_on(module, carry, h, copied):
        torch.manual_seed(1)
        h = carry(h) if copied else h
        for t in range(4, T):
            h = module(x[t], h)
            loss = loss_of(h)
            h = carry(h)
            loss.backward()
        return gradients(module)

    if copied == "deepcopy":
        module, other = copy.deepcopy((m, carry))
    elif copied == "pickle":
        module, other = pickle.loads(pickle.dumps((m, carry)))
    elif copied == "copy":
        module, other = m, copy.copy(carry)
    else:
        module, other = m, Carry(m, method=method, commit_every=carry.commit_every)
        other.load_state_dict(carry.state_dict())
    assert other.module is module
    # The state may still have its graph, which was captured before.
    found = go_on(module, other, h.detach() if copied == "pickle" else h, True)
    expected = go_on(m, carry, h, False)
    assert worst_error(found, expected) <= EXACT


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(2, H, **F64)
        self.carry = Carry(self.cell)


def test_a_module_that_holds_its_carry_is_copied():
    holder, x = Holder(), inputs()
    h = holder.carry(torch.zeros(B, H, **F64))
    h = holder.carry(holder.cell(x[0], h)).detach()
    for other in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert other.carry.module is other.cell and other.cell is not holder.cell
        own = other.carry(h)
        other.carry(other.cell(x[1], own))


# The check that never sleeps.


@pytest.mark.parametrize("module", ["chain", "general"])
@pytest.mark.parametrize("fault", ["parameter", "state"])
def test_verify_notices_a_captured_fault_and_leaves_grad(module, fault, monkeypatch):
    from sparse_rtrl.capture.graph_capture import GraphCapture
    from sparse_rtrl.capture.taped import TapedSteps
    from sparse_rtrl.learners.methods.exact import Exact

    m, x = nn.GRUCell(2, H, **F64), inputs()
    step = call if module == "chain" else (lambda m, x, h, t: torch.atan(m(x, h)))
    whole, back = GraphCapture.segment, TapedSteps.pull_back

    def broken(self, *arguments):
        J, factors = whole(self, *arguments)
        (factors.delta if fault == "parameter" else J)[:] *= 1.001
        return J, factors

    def broken_back(window, v, core, experts):
        v = back(window, v, core, experts)
        if fault == "parameter":
            core *= 1.001
        return v if fault == "parameter" else 1.001 * v

    if module == "chain":
        monkeypatch.setattr(Exact, "_agrees", lambda *_: (True, True))  # a fault that comes after the first segment
        monkeypatch.setattr(TapedSteps, "pull_back", broken_back)
    else:
        monkeypatch.setattr(GraphCapture, "segment", broken)
    carry = Carry(m, verify="always")
    h = carry(torch.zeros(B, H, **F64))
    with pytest.raises(DisagreementError, match=r"step 0, stream \d: .*capture='dense'") as raised:
        carry(step(m, x[0], h, 0))
    assert raised.value.names == (["the state"] if fault == "state" else raised.value.names) and raised.value.names
    assert m.weight_hh.grad is None
    carried(m, step, x, lambda: torch.zeros(B, H, **F64), verify="never")  # without it nothing is noticed
    noticed = 0
    for seed in range(40):
        carry = Carry(m, verify=4)
        carry._verifier._generator.manual_seed(seed)
        try:
            carried(m, step, x, lambda: torch.zeros(B, H, **F64), carry=carry)
        except DisagreementError:
            noticed += 1
    # 8 segments, one in 4: noticed with probability 1 - 0.75^8 = 0.9.
    assert 28 <= noticed <= 40


@pytest.mark.parametrize("verify", [0, -1, 1.5, "often", True])
def test_verify_is_checked(verify):
    with pytest.raises(ValueError, match="verify must be"):
        Carry(nn.GRUCell(2, H), verify=verify)


def test_the_draws_of_verify_are_saved():
    m, x = nn.GRUCell(2, H, **F64), inputs()

    def compared(split):
        carry = Carry(m, verify=3)
        h, count = carry(torch.zeros(B, H, **F64)), 0
        for t in range(T):
            h = carry(m(x[t], h))
            if t == split:
                saved, h = carry.state_dict(), h.detach()
                carry = Carry(m, verify=3)
                carry.load_state_dict(saved)
                h = carry(h)
        count = carry._verifier.compared
        return count, carry._verifier._generator.get_state().tolist()

    assert compared(3) == compared(None)
    assert compared(None)[0] > 0


def test_check_compares_with_bptt():
    m, x = nn.GRUCell(2, H, **F64), inputs()
    m.weight_hh.grad = kept = torch.ones_like(m.weight_hh)
    carry = Carry(m)
    errors = carry.check(lambda x_t, h: m(x_t, h), x, torch.zeros(B, H, **F64))
    assert set(errors) == {n for n, _ in m.named_parameters()} and max(errors.values()) <= EXACT
    assert m.weight_hh.grad is kept and carry._past.segments == 0
    with pytest.raises(ContractError, match=r"differs from backpropagation through the whole past: weight_ih by"):
        Carry(m, method="truncated").check(lambda x_t, h: m(x_t, h), x, torch.zeros(B, H, **F64))


def test_a_refused_state_changes_nothing():
    m, x = nn.GRUCell(2, H, **F64), inputs()
    first = lambda: torch.zeros(B, H, **F64)  # noqa: E731
    expected, carry = bptt(m, call, x, first), Carry(m)
    other = Carry(nn.GRUCell(3, H, **F64))
    other(other.module(inputs(3)[0], other(torch.zeros(B, H, **F64))))
    state = other.state_dict()
    broken = {name: value for name, value in carry.state_dict().items() if name != "kept"}

    def between(t, h):
        if t == 3:
            for wrong in (state, broken, None, {"version": 1}):
                with pytest.raises(ValueError, match="state"):
                    carry.load_state_dict(wrong)
        return h

    assert worst_error(carried(m, call, x, first, between, carry=carry), expected) <= EXACT


@pytest.mark.parametrize("how", ["load", "rollback", "copy"])
def test_a_loop_that_resumes_without_carry_is_refused(how):
    m, x = nn.GRUCell(2, H, **F64), inputs()
    carry = Carry(m)
    h = carry(m(x[0], carry(torch.zeros(B, H, **F64))))
    if how == "copy":
        other = copy.copy(carry)
    else:
        other = carry if how == "rollback" else Carry(m)
        other.load_state_dict(carry.state_dict())
    with pytest.raises(RuntimeError, match=r"belongs to another state: call h = carry\(h\) with the saved state"):
        other(m(x[1], h.detach()))


def test_parameters_replaced_in_a_segment_are_named():
    m, x = nn.GRUCell(2, H, **F64), inputs()
    carry = Carry(m)
    h = carry(torch.zeros(B, H, **F64))
    m.load_state_dict({name: p.clone() for name, p in m.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="weight_ih was removed, or replaced by another object"):
        carry(m(x[0], h))


@pytest.mark.parametrize("capture", ["auto", "dense"])
@pytest.mark.parametrize("on", ["state", "parameter"])
def test_backward_passes_that_look_at_the_sign_are_refused(on, capture):
    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g.clamp(min=0)

    def step(m, x, h, t):
        if on == "state":
            return Guided.apply(m(x, h))
        return torch.tanh(x @ Guided.apply(m.weight_ih).T[:, :H] + h)

    with pytest.raises(ContractError, match="not linear"):
        carried(
            nn.GRUCell(2, H, **F64), step, inputs(), lambda: torch.zeros(B, H, **F64), verify="never", capture=capture
        )


def test_embeddings_that_scale_by_frequency():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.cell = nn.Embedding(4, 2, scale_grad_by_freq=True, **F64), nn.RNNCell(2, H, **F64)

        def forward(self, x, h):
            return self.cell(self.table(x), h)

    x = torch.tensor([[0, 1, 2], [1, 1, 1], [3, 3, 0], [2, 2, 2], [0, 1, 2]])
    assert exact(Words(), call, x, lambda: torch.zeros(B, H, **F64), verify="never")


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_on_what_carry_returned(fused):
    def run(carry, m, x):
        optimizer, h, found = torch.optim.Adam(m.parameters(), fused=fused), torch.zeros(B, H, **F64), []
        h = carry(h)
        for t in range(T):
            h = carry(m(x[t], h))
            loss_of(h).backward()
            found.append(m.weight_hh.grad.clone())
            optimizer.step()
            optimizer.zero_grad()
        return found

    m, x = nn.GRUCell(2, H, **F64), inputs()
    before = {name: value.clone() for name, value in m.state_dict().items()}
    found = run(Carry(m), m, x)
    m.load_state_dict(before)

    optimizer, carry, h, expected = torch.optim.Adam(m.parameters(), fused=fused), Carry(m), None, []
    h = carry(torch.zeros(B, H, **F64))
    for t in range(T):
        o = h = m(x[t], h)
        h = carry(h)
        loss_of(o).backward()
        expected.append(m.weight_hh.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    assert worst_error({str(t): g for t, g in enumerate(found)}, {str(t): g for t, g in enumerate(expected)}) <= EXACT


@pytest.mark.parametrize("norm", ["weight_norm", "prune"])
def test_weights_made_anew_in_evaluation_are_no_state(norm):
    m, x = nn.GRUCell(2, H, **F64), inputs()
    if norm == "weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(m, "weight_hh")
    else:
        prune.random_unstructured(m, "weight_hh", 0.3)

    def between(t, h):
        with torch.no_grad():
            m(x[0], torch.zeros(B, H, **F64))
        return h

    assert exact(m, call, x, lambda: torch.zeros(B, H, **F64), between)


def test_a_default_device_changes_nothing():
    m, x = nn.GRUCell(2, H, **F64), inputs()
    carry, first = Carry(m, verify="always"), torch.zeros(B, H, **F64)
    h = carry(first)
    with torch.device("meta"):
        for t in range(3):
            h = carry(torch.atan(m(x[t], h)) if t else m(x[t], h))


# Messages.


def test_states_that_grow_or_are_empty_are_named():
    m = nn.LSTMCell(2, H, **F64)
    carry, zeros = Carry(m), torch.zeros(B, H, **F64)
    h = carry((zeros, None))
    with pytest.raises(ValueError, match=r"must keep its size \(B, H\): .* \(3, 5\) numbers, this one \(3, 10\)"):
        carry(m(inputs()[0], (h[0], zeros)))
    with pytest.raises(ValueError, match=r"state must hold numbers, got tensors of shapes \[\(0,\)\]"):
        Carry(m)(torch.zeros(0))


def test_resets_take_masks():
    carry = Carry(nn.GRUCell(2, H))
    with pytest.raises(ValueError, match=r"streams must be a bool mask .*got \[0\]"):
        carry.reset([0])


def test_lazy_and_resized_parameters_are_named():
    with pytest.raises(ValueError, match=r"parameters without a shape yet, \['weight', 'bias'\]"):
        Carry(nn.LazyLinear(3))
    m = nn.RNNCell(2, H, **F64)
    carry = Carry(m)
    h = carry(m(inputs()[0], carry(torch.zeros(B, H, **F64))))
    m.weight_ih = nn.Parameter(torch.randn(H, 4, **F64))
    with pytest.raises(RuntimeError, match=r"parameter weight_ih had shape \(5, 2\) .* has \(5, 4\) now"):
        carry(m(inputs(4)[0], h))


def test_sparse_gradients_are_refused_by_name():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.cell = nn.Embedding(7, 2, sparse=True, **F64), nn.RNNCell(2, H, **F64)

        def forward(self, x, h):
            return self.cell(self.table(x), h)

    with pytest.raises(ValueError, match=r"sparse gradients, \['table\.weight'\]"):
        Carry(Words())
    Carry(Words(), exclude=["table"])
