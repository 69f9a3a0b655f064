"""Slot cells at the edges: what a capture could miss is exact, or refused by name and nothing is changed."""

import copy
import warnings

import pytest
import torch
from oracle import bptt, cotangents, gradients_of, inputs, online, worst_error
from pattern_cell import PatternCell, make_pattern
from torch import nn
from torch.nn.utils import parametrizations

from sparse_rtrl import RTRL, ContractError, ExpertBank, Routing, SlotCell, SlotMoECell

EXACT = 1e-12


def slots(batch, count=1):
    return torch.arange(count).repeat(batch, 1)


class Cubed(torch.autograd.Function):
    """A product that no torch function shows."""

    @staticmethod
    def forward(ctx, z, weight):
        ctx.save_for_backward(z, weight)
        return z * weight**3

    @staticmethod
    def backward(ctx, g):
        z, weight = ctx.saved_tensors
        return g * weight**3, (g * z * 3 * weight**2).sum((0, 1))


class Edge(SlotCell):
    """One slot of three numbers, updated in a given way from step ``late`` on, the number being the last input."""

    def __init__(self, way="none", late=3):
        super().__init__(2, 3)
        self.way, self.late = way, late
        self.lin, self.token = nn.Linear(3, 3), nn.Linear(3, 3)
        self.fresh = nn.Parameter(torch.randn(3))
        self.normed = parametrizations.weight_norm(nn.Linear(3, 3))
        self.readout = nn.Linear(3, 2)
        self.register_buffer("mixing", torch.eye(64))

    def route(self, x, state):
        return Routing(slots(len(x)), slots(len(x)), slots(len(x), 0))

    def update(self, x, h_read, h_write, routing):
        new = torch.tanh(self.lin(h_write) + self.token(x[:, :3]).unsqueeze(1)).clone()
        now = bool(x[0, -1] >= self.late)
        way = self.way if now else "none"
        if way == "assigned":
            new[x[:, 0] > 0] = self.fresh
        elif way == "function":
            new = new + 0.1 * Cubed.apply(h_write, self.fresh)
        elif way == "gate":
            new = new + 0.1 * self.fresh * h_write
        elif way == "normed":
            new = new + 0.1 * h_write @ self.normed.weight
        elif way == "data":
            new = new + 0.1 * torch.where(x[:, :1, None] > 0, self.fresh * h_write, h_write)
        elif way == "mean":
            new = new + 0.1 * h_write.mean(0, keepdim=True)
        elif way == "centred":
            new = new - new.mean(0, keepdim=True)
        elif way == "scaled":
            new = new / (1 + new.std(0, keepdim=True))
        elif way == "softmax":
            new = new * h_write.softmax(0)
        elif way == "matrix":
            new = new + 0.1 * torch.einsum("bc,cij->bij", self.mixing[: len(x), : len(x)].roll(1, 0), h_write)
        elif way == "rolled":
            new = new + 0.1 * h_write.roll(1, 0)
        elif way == "first":
            new = new + 0.1 * h_write[:1]
        elif way == "last":
            new = new + 0.1 * h_write[-1:]
        elif way == "rank":
            new = new * (1 + h_write.sum((1, 2)).argsort().argsort()[:, None, None] / 10)
        elif way == "capacity":
            taken = (x[:, 0] > 0).long()
            new = new * (1 - 0.5 * (taken.cumsum(0) * taken > 1)[:, None, None])
        elif way == "count":
            new = new * (x[:, 0] > 0).sum() / 10
        elif way == "largest":
            new = new - 0.1 * h_write.amax(0, keepdim=True)
        elif way == "noise":
            new = new + 0.1 * torch.randn_like(new)
        elif way == "sorted":
            order = x[:, 0].argsort()
            new = torch.tanh(self.lin(h_write[order]) + self.token(x[order, :3]).unsqueeze(1))[order.argsort()]
        elif way == "input_mean":
            new = new + 0.1 * self.token(x[:, :3]).mean(0, keepdim=True)
        elif way == "readout":
            new = new + 0.1 * self.readout.weight[0] * h_write
        return new, self.readout(new[:, 0])


def steps(way, batch, count=8, late=3, options=None):
    """Error against BPTT of a learner that takes single steps, and what it warned of; no step is compared by chance."""
    torch.manual_seed(0)
    cell = Edge(way, late).double()
    x, c = inputs(count, batch), cotangents(count, batch, density=1.0)
    learner = RTRL(cell, batch, **{"verify": "never", **(options or {})})
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        found = online(learner, x, c)
    return worst_error(found, bptt(cell, x, c)), [str(note.message) for note in notes]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("way", ["assigned", "function", "gate", "normed", "data"])
def test_a_parameter_used_out_of_sight_is_carried(way, late, batch):
    """Item assignment, an autograd.Function, a use that begins later, a parametrized weight outside of its module."""
    for commit_every in (1, 4):
        error, notes = steps(way, batch, late=late, options={"commit_every": commit_every, "verify": "never"})
        assert error <= EXACT
        assert len(notes) == 1 and notes[0].startswith("normed.weight" if way == "normed" else "fresh")


@pytest.mark.parametrize("batch", [2, 3, 6])
@pytest.mark.parametrize("way", ["sorted", "input_mean"])
def test_rows_in_another_order_are_exact(way, batch):
    """Rows sorted and put back, and a mean over the inputs of all rows, from the start or later."""
    for late in (0, 3):
        assert steps(way, batch, late=late, options={"verify": "never"})[0] <= EXACT


COUPLED = "mean centred scaled softmax matrix rolled first last rank capacity count largest".split()


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("way", COUPLED)
def test_rows_that_influence_each_other_are_refused(way, late):
    torch.manual_seed(0)
    cell, x = Edge(way, late).double(), inputs(6, 3)
    x[..., 0] = torch.tensor([1.0, 2.0, 0.5])
    for capture in ("auto", "dense"):
        if capture == "dense" and way in ("rank", "capacity", "count"):
            continue  # what ran is what is captured: exact
        learner = RTRL(cell, 3, capture=capture, verify="never")
        for t in range(late):
            learner(x[t]).sum().backward()
        before = copy.deepcopy(learner.state_dict())
        with pytest.raises(ContractError, match=r"rows of the batch influence each other|disagrees|number of rows"):
            for t in range(late, 6):
                learner(x[t])
        if late:
            assert_same(before, learner.state_dict())


def test_a_weak_influence_of_rows_shows_in_coarse_arithmetic():
    """A hundredth of a mean is below the rounding of bfloat16, but not below a gradient that must be zero."""

    class Slight(Edge):
        def update(self, x, h_read, h_write, routing):
            new, output = super().update(x, h_read, h_write, routing)
            return new + 0.01 * float(x[0, -1] >= 3) * h_write.mean(0, keepdim=True), output

    torch.manual_seed(0)
    learner, x = RTRL(Slight(), 3, verify="never"), inputs(4, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for t in range(3):
            learner(x[t])
        with pytest.raises(ContractError, match="rows of the batch influence each other"):
            learner(x[3])


def assert_same(one, other, where="state"):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if key not in ("capture", "verifier"):
                assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert one == other, where


@pytest.mark.parametrize("way", ["rank", "capacity", "count"])
def test_dense_capture_takes_whole_streams(way):
    """What depends on the batch without a derivative is exact where nothing is repeated."""
    assert steps(way, 3, options={"capture": "dense"})[0] <= EXACT


@pytest.mark.parametrize("late", [0, 3])
def test_random_numbers_are_refused_with_the_reason(late):
    with pytest.raises(ContractError, match="draws random numbers"):
        steps("noise", 3, late=late)


def test_a_state_of_its_own_is_refused():
    class Counting(Edge):
        count = 0

        def update(self, x, h_read, h_write, routing):
            self.count += 1
            new, output = super().update(x, h_read, h_write, routing)
            return new * self.count, output

    with pytest.raises(ContractError, match="keeps a state of its own"):
        RTRL(Counting().double(), 2)(inputs(1, 2)[0])


def test_trainable_tensors_that_are_not_carried_are_refused_by_name():
    with pytest.raises(ContractError, match=r"readout\.weight reaches the state"):
        steps("readout", 2)
    outside = nn.Linear(3, 3).double()

    class Reaching(Edge):
        def update(self, x, h_read, h_write, routing):
            new, output = super().update(x, h_read, h_write, routing)
            return new + outside(h_write), output

    with pytest.raises(ContractError, match=r"of shape \(3, 3\), from outside"):
        RTRL(Reaching().double(), 2)(inputs(1, 2)[0])
    cell, x = Edge().double(), inputs(3, 2)
    learner = RTRL(cell, 2)
    learner(x[0])
    cell.lin = nn.Linear(3, 3).double()
    with pytest.raises(ContractError, match=r"lin\.weight reaches the state"):
        learner(x[1])
    torch.manual_seed(0)
    cell = SlotMoECell(4, 4, 4, 5, 2, 2, 2, 2).double()
    learner = RTRL(cell, 2)
    learner(x[0])
    cell.control = nn.Linear(4, 8).double()
    with pytest.raises(ContractError, match=r"control\.\w+ reaches the state"):
        learner(x[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_is_no_disagreement(dtype):
    """Every check of every step passes where the only difference is rounding: also with a narrow norm, and autocast."""

    class Narrow(PatternCell):
        def update(self, x, h_read, h_write, routing):
            new, output = super().update(x, h_read, h_write, routing)
            return torch.tanh(nn.functional.layer_norm(1 + 1e-3 * new, new.shape[-1:])), output

    torch.manual_seed(0)
    cell = Narrow(make_pattern("random", 20, 3), dense=False).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    x = inputs(20, 3, dtype=next(cell.parameters()).dtype)
    learner = RTRL(cell, 3, verify="always", commit_every=2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for t in range(20):
            learner(x[t]).sum().backward()
    assert learner._engine.verifier.compared == 20


@pytest.mark.parametrize("kind", ["factors", "dense", "fused", "routing"])
def test_the_caller_may_reuse_its_input(kind):
    """The window keeps no view of the input, in any path, nor of a routing that is made of the input."""
    torch.manual_seed(0)
    if kind == "fused":
        cell = SlotMoECell(4, 4, 4, 5, 2, 2, 2, 2).double()
    elif kind == "routing":

        class Told(PatternCell):
            def route(self, x, state):
                told = x[:, :4].long()
                return Routing(told[:, :2], told[:, 2:], told[:, :2])

            def update(self, x, h_read, h_write, routing):
                return super().update(x.double() / 3, h_read, h_write, routing)

        cell = Told([], dense=False).double()
    else:
        cell = PatternCell(make_pattern("random", 9, 2), dense=kind == "dense").double()
    x, c = inputs(9, 2), cotangents(9, 2, density=1.0)
    if kind == "routing":
        x = torch.stack([torch.stack([torch.randperm(4) for _ in range(2)]) for _ in range(9)])
    expected = bptt(cell, x, c)
    learner, buffer = RTRL(cell, 2, commit_every=9), torch.empty_like(x[0])
    cell.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(9):
            buffer.copy_(x[t])
            (learner(buffer) * c[t]).sum().backward()
            buffer.fill_(1)
    learner.flush()
    assert len(learner._engine.influence.window) == 9
    assert worst_error(gradients_of(cell), expected) <= EXACT


def test_the_state_that_is_handed_out_is_a_copy():
    learner, x = RTRL(Edge().double(), 2), inputs(3, 2)
    learner(x[0])
    before = learner.state
    learner.state.zero_()
    assert before.any() and torch.equal(learner.state, before)


def test_a_route_that_changes_the_state_is_refused():
    class Erasing(Edge):
        def route(self, x, state):
            state[:, 1] = 0
            return super().route(x, state)

    with pytest.raises(ContractError, match="route must not change the state"):
        RTRL(Erasing().double(), 2)(inputs(1, 2)[0])


class Listed(SlotCell):
    """Experts in a ``ModuleList``, run on all rows and chosen afterwards, or on the rows that chose them."""

    def __init__(self, masked):
        super().__init__(3, 3, 4)
        self.masked = masked
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        self.token, self.readout = nn.Linear(3, 3), nn.Linear(3, 2)

    def route(self, x, state):
        number = x[:, -1:].long() + torch.arange(len(x)).unsqueeze(1)
        return Routing(number % 3, (number + 1) % 3, torch.cat((number % 4, (number + 1 + number % 2) % 4), 1))

    def update(self, x, h_read, h_write, routing):
        z = self.token(x[:, :3]) + h_read[:, 0]
        if self.masked:
            y = torch.zeros_like(z)
            for e, expert in enumerate(self.experts):
                rows = (routing.experts == e).any(1)
                y = y.index_add(0, rows.nonzero()[:, 0], expert(z[rows]))
        else:
            every = torch.stack([expert(z) for expert in self.experts], 1)
            y = every.gather(1, routing.experts.unsqueeze(-1).expand(-1, -1, 3)).sum(1)
        new = torch.tanh(0.5 * h_write + y.unsqueeze(1))
        return new, self.readout(new[:, 0])


@pytest.mark.filterwarnings("ignore:.*used in a way")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("catch_up", ["auto", "eager", "replay", "product"])
def test_experts_in_a_module_list(masked, catch_up):
    torch.manual_seed(0)
    cell, x, c = Listed(masked).double(), inputs(12, 3), cotangents(12, 3)
    expected = bptt(cell, x, c)
    for segment in (1, 4):
        learner = RTRL(cell, 3, catch_up=catch_up, buffer=4, commit_every=3)
        assert worst_error(online(learner, x, c, segment), expected) <= EXACT
        assert learner.routings[0].experts.shape == (3, 2)
        learner.load_state_dict(learner.state_dict())


@pytest.mark.parametrize("kind", ["ready", "pattern"])
@pytest.mark.parametrize("catch_up", ["auto", "eager", "replay", "product"])
def test_all_experts_frozen(kind, catch_up):
    torch.manual_seed(0)
    if kind == "ready":
        cell = SlotMoECell(4, 4, 4, 5, 2, 2, 2, 2).double()
    else:
        cell = PatternCell(make_pattern("random", 12, 3), dense=False).double()
    cell.experts.requires_grad_(False)
    x, c = inputs(12, 3), cotangents(12, 3)
    learner = RTRL(cell, 3, catch_up=catch_up, buffer=4, commit_every=3)
    expected = bptt(cell, x, c)
    for segment in (1, 4):
        learner.reset()
        assert worst_error(online(learner, x, c, segment), expected) <= EXACT
    learner.load_state_dict(learner.state_dict())
    cell.experts.requires_grad_(True)
    learner.reset()
    expected = bptt(cell, x, c)
    with pytest.warns(UserWarning, match="trainable from now on"):
        assert worst_error(online(learner, x, c), expected) <= EXACT


def test_a_cell_without_experts_loads_its_own_state():
    for catch_up in ("auto", "eager", "replay", "product"):
        learner = RTRL(Edge().double(), 2, catch_up=catch_up, buffer=4)
        learner(inputs(1, 2)[0])
        learner.load_state_dict(learner.state_dict())


def test_errors_name_what_is_wrong():
    bank = ExpertBank(5, 3, 2)
    experts = torch.tensor([[0, 1], [2, 3], [1, 4]])
    for shape in ((3, 3), (3, 1, 3), (2, 2, 3), (3, 2, 4), (3, 2, 5, 4)):
        message = rf"z must have shape \(3, 2, \.\.\., 3\), .*got \({', '.join(map(str, shape))}\)"
        with pytest.raises(ValueError, match=message):
            bank(torch.zeros(shape), experts)
    assert bank(torch.zeros(3, 2, 5, 3), experts).shape == (3, 2, 5, 2)
    learner = RTRL(Edge(), 2)
    for streams in ([0], 0, torch.tensor([0, 1]), torch.tensor([True])):
        with pytest.raises(ValueError, match=r"streams must be a bool mask of shape \(2,\), got"):
            learner.reset(streams)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = Edge()
        lazy.other = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"shape is not known yet: other\.weight, other\.bias"):
        RTRL(lazy, 2)
    sparse = Edge()
    sparse.table = nn.Embedding(4, 3, sparse=True)
    with pytest.raises(ContractError, match=r"table \(Embedding\) has sparse gradients"):
        RTRL(sparse, 2)


def test_a_functional_sparse_embedding_is_refused():
    class Looking(Edge):
        def update(self, x, h_read, h_write, routing):
            new, output = super().update(x, h_read, h_write, routing)
            return new + nn.functional.embedding(routing.write, self.table, sparse=True), output

    cell = Looking().double()
    cell.table = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    for capture, name in (("auto", "table"), ("dense", "a parameter")):
        with pytest.raises(ContractError, match=f"{name} has sparse gradients"):
            RTRL(cell, 2, capture=capture)(inputs(1, 2)[0])


@pytest.mark.parametrize("name", ["lin.weight", "readout.weight", "experts"])
def test_a_parameter_that_was_resized_is_named(name):
    torch.manual_seed(0)
    cell = SlotMoECell(4, 4, 4, 5, 2, 2, 2, 2) if name == "experts" else Edge()
    parameter = cell.experts.bias if name == "experts" else cell.get_parameter(name)
    learner, x = RTRL(cell, 2), inputs(1, 2)[0].float()
    learner(x)
    parameter.data = torch.zeros(7, *parameter.shape[1:])
    if name == "readout.weight":  # not carried
        return
    with pytest.raises(RuntimeError, match=r"was torch\.float32 \(\d.*is torch\.float32 \(7.*build a new learner"):
        learner(x)


def test_modules_of_less_precision_inside_are_no_disagreement():
    """float32 inside of a float64 cell: its rounding is not a difference."""

    class Mixed(Edge):
        def update(self, x, h_read, h_write, routing):
            new, output = super().update(x, h_read, h_write, routing)
            inner = nn.functional.linear(h_write.float(), self.lin.weight.float())
            return new + 0.1 * torch.tanh(inner).double(), output

    torch.manual_seed(0)
    learner, x = RTRL(Mixed().double(), 3, verify="always"), inputs(12, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(12):
            learner(x[t]).sum().backward()


def test_hooks_of_the_cell_itself_are_refused():
    cell = SlotMoECell(3, 4, 2, 2, 1, 1, 1, 2)
    learner = RTRL(cell, 2)
    learner(torch.randn(2, 3))
    cell.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ContractError, match="hooks of its own"):
        learner(torch.randn(2, 3))


@pytest.mark.parametrize("how", ["random", "annealed"])
def test_parametrizations_that_change_by_themselves_are_refused(how):
    class Changing(torch.nn.Module):
        scale = 1.0

        def forward(self, w):
            return w * (torch.rand_like(w) if how == "random" else self.scale)

    cell = SlotMoECell(3, 4, 2, 2, 1, 1, 1, 2)
    linear = next(m for m in cell.modules() if isinstance(m, torch.nn.Linear))
    changing = Changing()
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", changing)
    learner = RTRL(cell, 2, verify="never")
    with pytest.raises(ContractError, match="gives another value for the same parameters"):
        for _ in range(3):
            learner(torch.randn(2, 3)).sum().backward()
            changing.scale *= 0.9
