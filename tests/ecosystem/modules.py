"""Recurrent modules of other packages, small, and how one drives them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comparison import STEPS, Recurrence, without_rounding
from torch import Tensor, nn
from torch.utils import _pytree as pytree

B, X, H = 3, 2, 4


@dataclass
class Case:
    """A row of the table.

    Attributes:
        name: of the module, in the table.
        package: the distribution it comes from.
        build: makes it.
        expected: verdicts that pass; ``"wrong"`` is never among them.
        refusal: what the message of a refusal has to name.
        dtype: of the module.
        arithmetic: the coarsest dtype that it computes in.
        lengths: of the segments.
        around: context of the whole comparison.
        remark: for the table.
    """

    name: str
    package: str
    build: Callable[[], Recurrence]
    expected: tuple[str, ...]
    refusal: str = ""
    dtype: torch.dtype = torch.float64
    arithmetic: torch.dtype = torch.float64
    lengths: tuple[int, ...] = (1, 3)
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    remark: str = ""

    @property
    def title(self) -> str:
        """Package and module, without markup."""
        return f"{self.package} {self.name}".replace("`", "")

    @property
    def imported(self) -> str:
        """The package as Python imports it; torch_geometric_temporal itself needs :func:`graph_cells`."""
        return {PYG_TEMPORAL: "torch_geometric"}.get(self.package, self.package.replace("-", "_"))


CASES: list[Case] = []

PYG_TEMPORAL = "torch-geometric-temporal"

EXACT = ("exact",)
REFUSED = ("refused",)
EITHER = ("exact", "refused")


def case(name: str, package: str, expected: tuple[str, ...] = EXACT, **options: Any) -> Callable[..., Any]:
    """Register what makes a recurrence."""

    def register(build: Callable[[], Recurrence]) -> Callable[[], Recurrence]:
        CASES.append(Case(name, package, build, expected, **options))
        return build

    return register


def inputs(*shape: int) -> Tensor:
    return torch.randn(STEPS, *shape)


def scattered(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """The module with its trainable parameters moved, so that none of them is zero and all gates differ."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return module


def stepwise(step: Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    """A segment by one call for each step."""

    def run(module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs = []
        for x_t in x:
            output, state = step(module, x_t, state)
            outputs.append(output)
        return torch.stack(outputs), state

    return run


def by_call(module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One step of a module with the interface of a cell: ``output, state = module(x, state)``."""
    output, state = module(x, state)
    return output, state


def batch_first(module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A segment in one call of a module that takes ``(B, n, X)``."""
    return module(x.transpose(0, 1), state)


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Modules that make tensors of the default dtype make float64 ones."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def from_none(recurrence: Recurrence) -> Recurrence:
    """The same loop from None, where the module makes the first state."""
    return replace(recurrence, state=None, bare=True)


# ncps: closed-form and liquid time-constant networks


def cfc(**options: Any) -> Recurrence:
    from ncps.torch import CfC

    module = CfC(X, H, backbone_units=6, **options)
    state = torch.randn(B, H)
    return Recurrence(module, batch_first, inputs(B, X), (state, torch.randn(B, H)) if module.use_mixed else state)


@case("`CfC`", "ncps")
def cfc_default() -> Recurrence:
    return cfc()


@case("`CfC`, from None", "ncps")
def cfc_from_none() -> Recurrence:
    return from_none(cfc())


@case('`CfC`, `mode="pure"`', "ncps")
def cfc_pure() -> Recurrence:
    recurrence = cfc(mode="pure")
    scattered(recurrence.module)
    return recurrence


@case('`CfC`, `mode="no_gate"`', "ncps")
def cfc_no_gate() -> Recurrence:
    return cfc(mode="no_gate")


@case("`CfC`, `mixed_memory`", "ncps")
def cfc_mixed() -> Recurrence:
    return cfc(mixed_memory=True)


@case("`CfC`, irregular times", "ncps")
def cfc_times() -> Recurrence:
    from ncps.torch import CfCCell

    def step(module: nn.Module, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return module(x[:, :X], state, x[:, X:].abs())

    return Recurrence(CfCCell(X, H, backbone_units=6), stepwise(step), inputs(B, X + 1), torch.randn(B, H))


@case("`CfC`, wired (`AutoNCP`)", "ncps")
def cfc_wired() -> Recurrence:
    from ncps.torch import CfC
    from ncps.wirings import AutoNCP

    return Recurrence(CfC(X, AutoNCP(8, 2)), batch_first, inputs(B, X), torch.randn(B, 8))


@case("`LTC`", "ncps")
def ltc() -> Recurrence:
    from ncps.torch import LTC

    return Recurrence(LTC(X, H), batch_first, inputs(B, X), torch.randn(B, H))


@case("`LTC`, wired (`AutoNCP`), `mixed_memory`", "ncps")
def ltc_wired() -> Recurrence:
    from ncps.torch import LTC
    from ncps.wirings import AutoNCP

    module = LTC(X, AutoNCP(8, 2), mixed_memory=True)
    return Recurrence(module, batch_first, inputs(B, X), (torch.randn(B, 8), torch.randn(B, 8)))


FLOAT32 = {"dtype": torch.float32, "arithmetic": torch.float32}
MIXED = {"arithmetic": torch.float32}
DOUBLE = "its casts `.float()` give float64 here"

# snnTorch: spiking neurons


class Spiking(nn.Module):
    """A linear layer and a spiking one."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.linear, self.neuron = nn.Linear(X, H), neuron

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        return self.neuron(2 * self.linear(x), *state)


@case("`Leaky`", "snntorch", around=without_rounding, remark=DOUBLE)
def leaky() -> Recurrence:
    from snntorch import Leaky

    return Recurrence(Spiking(Leaky(beta=0.8)), stepwise(by_call), inputs(B, X), torch.randn(B, H))


@case("`Leaky`, from None", "snntorch", around=without_rounding, remark=DOUBLE)
def leaky_from_none() -> Recurrence:
    def begin(module: nn.Module) -> None:
        module.neuron.mem = torch.zeros(0, dtype=module.linear.weight.dtype)

    return replace(from_none(leaky()), begin=begin)


@case("`Leaky`, from `carry(reset_mem())`", "snntorch", EITHER, around=without_rounding, remark="of shape `(0,)`")
def leaky_from_reset() -> Recurrence:
    recurrence = leaky()
    return replace(recurrence, state=recurrence.module.neuron.reset_mem())


@case("`Leaky`, trained decay and threshold", "snntorch", around=without_rounding, remark=DOUBLE)
def leaky_trained() -> Recurrence:
    from snntorch import Leaky

    neuron = Leaky(beta=0.5 + 0.4 * torch.rand(H), threshold=torch.rand(H), learn_beta=True, learn_threshold=True)
    return Recurrence(Spiking(neuron), stepwise(by_call), inputs(B, X), torch.randn(B, H))


def leaky_reset_to_zero() -> Recurrence:
    from snntorch import Leaky

    neuron = Leaky(beta=0.8, reset_mechanism="zero", reset_delay=False)
    return Recurrence(Spiking(neuron), stepwise(by_call), inputs(B, X), torch.randn(B, H))


ZERO = '`Leaky`, `reset_mechanism="zero"`, no delay'
case(ZERO, "snntorch", around=without_rounding, remark=DOUBLE)(leaky_reset_to_zero)
case(f"{ZERO}, float32", "snntorch", **FLOAT32)(leaky_reset_to_zero)
case(f"{ZERO}, float64 with its own casts to float32", "snntorch", **MIXED)(leaky_reset_to_zero)


@case("two layers of `Leaky`", "snntorch", around=without_rounding, remark=DOUBLE)
def leaky_layers() -> Recurrence:
    from snntorch import Leaky

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.linear, self.above = Spiking(Leaky(beta=0.8)), nn.Linear(H, H), Leaky(beta=0.7)

        def forward(self, x: Tensor, state: Any) -> Any:
            spikes, below = self.below(x, state[0])
            spikes, above = self.above(self.linear(spikes), state[1])
            return spikes, (below, above)

    return Recurrence(Layers(), stepwise(by_call), inputs(B, X), (torch.randn(B, H), torch.randn(B, H)))


@case("`RLeaky`", "snntorch", around=without_rounding, remark=DOUBLE)
def rleaky() -> Recurrence:
    from snntorch import RLeaky

    def step(module: nn.Module, x: Tensor, state: Any) -> Any:
        spikes, membrane = module(x, *state)
        return spikes, (spikes, membrane)

    neuron = RLeaky(beta=0.8, linear_features=H)
    return Recurrence(Spiking(neuron), stepwise(step), inputs(B, X), (torch.zeros(B, H), torch.randn(B, H)))


@case("`Synaptic`", "snntorch", around=without_rounding, remark=DOUBLE)
def synaptic() -> Recurrence:
    from snntorch import Synaptic

    def step(module: nn.Module, x: Tensor, state: Any) -> Any:
        spikes, *state = module(x, *state)
        return spikes, tuple(state)

    neuron = Synaptic(alpha=0.7, beta=0.8, learn_alpha=True, learn_beta=True)
    return Recurrence(Spiking(neuron), stepwise(step), inputs(B, X), (torch.randn(B, H), torch.randn(B, H)))


def leaky_hidden(above: bool) -> Recurrence:
    from snntorch import Leaky

    class Hidden(nn.Module):
        """A carried cell, above or below a neuron that keeps its own state."""

        def __init__(self) -> None:
            super().__init__()
            self.cell, self.linear = nn.GRUCell(H if above else X, H), nn.Linear(X if above else H, H)
            self.neuron = Leaky(beta=0.8, init_hidden=True)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            if above:
                state = self.cell(self.neuron(2 * self.linear(x)), state)
                return state, state
            state = self.cell(x, state)
            return self.neuron(2 * self.linear(state)), state

    def begin(module: nn.Module) -> None:
        module.neuron.mem = torch.zeros(0, dtype=module.neuron.threshold.dtype)

    def detach(module: nn.Module) -> None:
        module.neuron.mem.detach_()

    return Recurrence(Hidden(), stepwise(by_call), inputs(B, X), torch.randn(B, H), begin=begin, detach=detach)


HIDDEN = {
    "refusal": r"\bneuron\.mem\b",
    "around": without_rounding,
    "remark": "keeps its membrane potential inside: pass it as a state instead",
}
case("`Leaky`, `init_hidden=True`, below a carried GRU", "snntorch", REFUSED, **HIDDEN)(lambda: leaky_hidden(True))
case("`Leaky`, `init_hidden=True`, above a carried GRU", "snntorch", REFUSED, **HIDDEN)(lambda: leaky_hidden(False))


# norse: spiking neurons


@case("`LIFCell`", "norse")
def lif() -> Recurrence:
    from norse.torch import LIFCell, LIFFeedForwardState, LIFParameters

    state = LIFFeedForwardState(v=torch.rand(B, H), i=torch.rand(B, H))
    return Recurrence(Spiking(LIFCell(LIFParameters(alpha=torch.tensor(5.0)))), stepwise(by_call), inputs(B, X), state)


@case("`LIFRecurrentCell`", "norse")
def lif_recurrent() -> Recurrence:
    from norse.torch import LIFParameters, LIFRecurrentCell
    from norse.torch.functional.lif import LIFState

    module = LIFRecurrentCell(X, H, LIFParameters(alpha=torch.tensor(5.0)))
    state = LIFState(z=torch.zeros(B, H), v=torch.rand(B, H), i=torch.rand(B, H))
    return Recurrence(module, stepwise(by_call), inputs(B, X), state)


FOREIGN_LEAF = {
    "refusal": "trainable",
    "around": float64_by_default,
    "remark": "the first state that it makes requires a gradient that nobody reads: give it a first state",
}


@case("`LIFCell`, from None", "norse", EITHER, **FOREIGN_LEAF)
def lif_from_none() -> Recurrence:
    return from_none(lif())


@case("`LIFRecurrentCell`, from None", "norse", EITHER, **FOREIGN_LEAF)
def lif_recurrent_from_none() -> Recurrence:
    return from_none(lif_recurrent())


@case("`LSNNRecurrentCell`", "norse", EITHER)
def lsnn() -> Recurrence:
    from norse.torch import LSNNParameters, LSNNRecurrentCell
    from norse.torch.functional.lsnn import LSNNState

    module = LSNNRecurrentCell(X, H, LSNNParameters(alpha=5.0))
    state = LSNNState(*(torch.rand(B, H) for _ in range(4)))
    return Recurrence(module, stepwise(by_call), inputs(B, X), state)


# mambapy: a selective state space


def mamba() -> Recurrence:
    from mambapy.mamba import Mamba, MambaConfig

    module = scattered(Mamba(MambaConfig(d_model=2, n_layers=2, d_state=2, d_conv=3)), 0.1)
    width = module.config.d_inner
    caches = [(torch.randn(B, width, 2), torch.randn(B, width, 2)) for _ in range(2)]

    def step(module: nn.Module, x: Tensor, caches: Any) -> tuple[Tensor, Any]:
        return module.step(x, list(caches))  # it writes into the list

    return Recurrence(module, stepwise(step), inputs(B, 2), caches)


case(
    "`Mamba.step`, two layers",
    "mambapy",
    around=without_rounding,
    remark=DOUBLE,
)(mamba)
case("`Mamba.step`, two layers, float32", "mambapy", **FLOAT32)(mamba)
case("`Mamba.step`, two layers, float64 with its own casts to float32", "mambapy", **MIXED)(mamba)


@case("`Mamba.step`, from `(None, zeros)`", "mambapy", around=without_rounding, remark=DOUBLE)
def mamba_from_none() -> Recurrence:
    recurrence = mamba()
    caches = [(None, torch.zeros_like(inputs)) for _, inputs in recurrence.state]
    return replace(recurrence, state=caches, bare=True)


@case(
    "`Mamba.step`, from `carry((None, zeros))`",
    "mambapy",
    EITHER,
    around=without_rounding,
    remark="the state gets more tensors in the first segment",
)
def mamba_through_none() -> Recurrence:
    return replace(mamba_from_none(), bare=False)


# SRU


def sru(**options: Any) -> Recurrence:
    from sru import SRU

    module = scattered(SRU(X, H, **options), 0.1)
    return Recurrence(module, lambda module, x, state: module(x, state), inputs(B, X), torch.randn(2, B, H), 1)


@case("`SRU`, two layers", "sru")
def sru_layers() -> Recurrence:
    return sru(num_layers=2)


@case("`SRU`, two layers, from None", "sru")
def sru_from_none() -> Recurrence:
    return from_none(sru(num_layers=2))


@case("`SRU`, two layers, projections and layer norm", "sru")
def sru_options() -> Recurrence:
    return sru(num_layers=2, projection_size=1, layer_norm=True)


# minGRU, minLSTM


def minimal(module: nn.Module, state: Tensor) -> Recurrence:
    def run(module: nn.Module, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return module(x.transpose(0, 1), state, return_next_prev_hidden=True)

    return Recurrence(module, run, inputs(B, H), state)


@case("`minGRU`", "minGRU-pytorch", remark="segments of 3 by its parallel scan")
def mingru() -> Recurrence:
    from minGRU_pytorch import minGRU

    return minimal(minGRU(H, expansion_factor=1.5), 0.1 + torch.rand(B, 1, 6))


@case("`minGRU`, from None", "minGRU-pytorch", remark="segments of 3 by its parallel scan")
def mingru_from_none() -> Recurrence:
    return from_none(mingru())


@case("`minLSTM`", "minGRU-pytorch", remark="step by step; its parallel scan computes something else")
def minlstm() -> Recurrence:
    from minGRU_pytorch.minLSTM import minLSTM

    def step(module: nn.Module, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return module(x.unsqueeze(1), state, return_next_prev_hidden=True)

    return Recurrence(minLSTM(H, expansion_factor=1.5), stepwise(step), inputs(B, H), 0.1 + torch.rand(B, 1, 6))


# torchdiffeq: a GRU whose state follows an ODE between observations


class OdeRnn(nn.Module):
    def __init__(self, solve: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.flow = nn.Sequential(nn.Linear(H, 6), nn.Tanh(), nn.Linear(6, H))
        self.cell, self.solve, self.options = nn.GRUCell(X, H), solve, options

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        times = torch.tensor([0.0, 0.7], dtype=h.dtype)
        options = {"adjoint_params": tuple(self.flow.parameters())} if "adjoint" in self.solve.__name__ else {}
        h = self.cell(x, self.solve(lambda t, h: self.flow(h), h, times, **self.options, **options)[-1])
        return h, h


@case('ODE-RNN, `odeint(method="rk4")`', "torchdiffeq")
def ode_fixed() -> Recurrence:
    from torchdiffeq import odeint

    module = OdeRnn(odeint, method="rk4", options={"step_size": 0.35})
    return Recurrence(module, stepwise(by_call), inputs(B, X), torch.randn(B, H))


@case(
    'ODE-RNN, `odeint(method="dopri5")`',
    "torchdiffeq",
    REFUSED,
    refusal="streams",
    remark="the step size depends on all streams, which couples them: take fixed steps, or all streams as one",
)
def ode_adaptive() -> Recurrence:
    from torchdiffeq import odeint

    module = OdeRnn(odeint, method="dopri5", rtol=1e-5, atol=1e-6)
    return Recurrence(module, stepwise(by_call), inputs(B, X), torch.randn(B, H))


@case(
    'ODE-RNN, `odeint(method="dopri5", rtol=1e-2)`, float32',
    "torchdiffeq",
    REFUSED,
    refusal="streams",
    remark="as above; the coupling is weaker than rounding in one step, and not in the gradient",
    **FLOAT32,
)
def ode_adaptive_float32() -> Recurrence:
    from torchdiffeq import odeint

    module = OdeRnn(odeint, method="dopri5", rtol=1e-2, atol=1e-2)
    return Recurrence(module, stepwise(by_call), inputs(B, X), torch.randn(B, H))


@case('ODE-RNN, `odeint(method="dopri5")`, all streams as one, `(1, B, H)`', "torchdiffeq")
def ode_adaptive_as_one() -> Recurrence:
    from torchdiffeq import odeint

    def step(module: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = module(x, h[0])[1].unsqueeze(0)
        return h, h

    module = OdeRnn(odeint, method="dopri5", rtol=1e-5, atol=1e-6)
    return Recurrence(module, stepwise(step), inputs(B, X), torch.randn(1, B, H))


@case(
    'ODE-RNN, `odeint_adjoint(method="rk4")`',
    "torchdiffeq",
    EITHER,
    remark="solves another ODE in the backward pass; take `odeint`",
)
def ode_adjoint() -> Recurrence:
    from torchdiffeq import odeint_adjoint

    module = OdeRnn(odeint_adjoint, method="rk4", options={"step_size": 0.35})
    return Recurrence(module, stepwise(by_call), inputs(B, X), torch.randn(B, H))


# NX-AI xlstm


def slstm_config(kind: Any, **options: Any) -> Any:
    return kind(num_heads=2, backend="vanilla", recurrent_weight_init="standard", bias_init="standard", **options)


@case("`sLSTMCell`", "xlstm", remark='`backend="vanilla"`')
def slstm_cell() -> Recurrence:
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    module = sLSTMCell(slstm_config(sLSTMCellConfig, hidden_size=H))

    def run(module: nn.Module, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return module(x.transpose(0, 1), state)

    return Recurrence(module, run, inputs(B, 4 * H), torch.zeros(4, B, H), 1)


@case("`sLSTMCell`, from None", "xlstm")
def slstm_cell_from_none() -> Recurrence:
    return from_none(slstm_cell())


def streams_first(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step whose sLSTM states ``(4, B, H)`` are carried as ``(B, 4, H)``, like the others."""

    def swap(state: Any) -> Any:
        if isinstance(state, dict):
            return {k: v.transpose(0, 1) if k == "slstm_state" else swap(v) for k, v in state.items()}
        return state

    def swapped(module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = step(module, x.unsqueeze(1), swap(state))
        return output, swap(state)

    return swapped


def copied(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step on a copy of the state: the convolution writes into it, which plain autograd does not allow."""

    def on_a_copy(module: nn.Module, x: Tensor, state: Any) -> Any:
        return step(module, x, pytree.tree_map(torch.clone, state))

    return on_a_copy


def slstm_layer(step: Callable[..., Any]) -> Recurrence:
    from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

    module = scattered(sLSTMLayer(slstm_config(sLSTMLayerConfig, embedding_dim=H, conv1d_kernel_size=3)), 0.1)
    state = {"conv_state": (torch.randn(B, 3, H),), "slstm_state": torch.zeros(B, 4, H)}
    return Recurrence(module, stepwise(step), inputs(B, H), state, run_bptt=stepwise(copied(step)))


def mlstm_layer(step: Callable[..., Any]) -> Recurrence:
    from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig

    config = mLSTMLayerConfig(
        embedding_dim=2, num_heads=2, conv1d_kernel_size=3, qkv_proj_blocksize=2, context_length=8
    )
    config._inner_embedding_dim = 4
    module = scattered(mLSTMLayer(config), 0.1)
    state = {
        "mlstm_state": (0.1 * torch.randn(B, 2, 2, 2), 0.1 * torch.randn(B, 2, 2, 1), torch.zeros(B, 2, 1, 1)),
        "conv_state": (torch.randn(B, 3, 4),),
    }
    return Recurrence(module, stepwise(step), inputs(B, 2), state, run_bptt=stepwise(copied(step)))


layer_step = streams_first(lambda module, x, state: module.step(x, **state))
OVERWRITES = "its convolution writes into the state that it is given"

case("`sLSTMLayer.step`", "xlstm", EITHER, lengths=(1,), remark=f"{OVERWRITES}; sLSTM state as `(B, 4, H)`")(
    lambda: slstm_layer(layer_step)
)
case("`sLSTMLayer.step` on a copy of the state", "xlstm")(lambda: slstm_layer(copied(layer_step)))
case("`mLSTMLayer.step`", "xlstm", EITHER, lengths=(1,), remark=OVERWRITES)(lambda: mlstm_layer(layer_step))
case("`mLSTMLayer.step` on a copy of the state", "xlstm", EITHER)(lambda: mlstm_layer(copied(layer_step)))


@case("`mLSTMCell.step`", "xlstm", EITHER)
def mlstm_cell() -> Recurrence:
    from xlstm.blocks.mlstm.cell import mLSTMCell, mLSTMCellConfig

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(X, H) for _ in range(3))
            self.cell = scattered(mLSTMCell(mLSTMCellConfig(context_length=8, embedding_dim=H, num_heads=2)))

        def forward(self, x: Tensor, state: Any) -> Any:
            x = x.unsqueeze(1)
            return self.cell.step(self.q(x), self.k(x), self.v(x), mlstm_state=state)

    state = (0.1 * torch.randn(B, 2, 2, 2), 0.1 * torch.randn(B, 2, 2, 1), torch.zeros(B, 2, 1, 1))
    return Recurrence(Projected(), stepwise(by_call), inputs(B, X), state)


# torch_geometric_temporal: cells on graphs

NODES = 4
EDGES = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 0]])
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.7, 0.3, 0.3])


def graph_cells() -> Any:
    """The package's recurrent cells; ``torch_sparse``, a type hint of EvolveGCN-O alone, may be missing."""
    if "torch_sparse" not in sys.modules:
        try:
            import torch_sparse  # noqa: F401
        except ImportError:
            import torch_geometric.typing

            stand_in = types.ModuleType("torch_sparse")
            stand_in.SparseTensor = torch_geometric.typing.SparseTensor
            sys.modules["torch_sparse"] = stand_in
    from torch_geometric_temporal.nn import recurrent

    return recurrent


def on_graph(module: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = module(x, EDGES, WEIGHTS.to(x.dtype), h)
    return h, h


@case(
    "`GConvGRU`, one graph, nodes as dimension 0",
    PYG_TEMPORAL,
    REFUSED,
    refusal="streams",
    remark="nodes are no streams: add a dimension for the streams",
)
def gconv_gru_nodes() -> Recurrence:
    return Recurrence(graph_cells().GConvGRU(X, 3, 2), stepwise(on_graph), inputs(NODES, X), torch.randn(NODES, 3))


@case("`GConvGRU`, state `(1, nodes, H)`", PYG_TEMPORAL)
def gconv_gru_one_stream() -> Recurrence:
    def step(module: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = module(x, EDGES, WEIGHTS.to(x.dtype), h[0]).unsqueeze(0)
        return h, h

    return Recurrence(graph_cells().GConvGRU(X, 3, 2), stepwise(step), inputs(NODES, X), torch.randn(1, NODES, 3))


@case("`GConvGRU`, streams `(B, nodes, H)`", PYG_TEMPORAL)
def gconv_gru_streams() -> Recurrence:
    module = graph_cells().GConvGRU(X, 3, 2)
    return Recurrence(module, stepwise(on_graph), inputs(B, NODES, X), torch.randn(B, NODES, 3))


@case("`GCLSTM`, streams `(B, nodes, H)`", PYG_TEMPORAL, EITHER)
def gclstm() -> Recurrence:
    def step(module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = module(x, EDGES, WEIGHTS.to(x.dtype), *state)
        return state[0], state

    state = (torch.randn(B, NODES, 3), torch.randn(B, NODES, 3))
    return Recurrence(scattered(graph_cells().GCLSTM(X, 3, 2)), stepwise(step), inputs(B, NODES, X), state)


@case("`TGCN2`, streams `(B, nodes, H)`", PYG_TEMPORAL, EITHER)
def tgcn() -> Recurrence:
    module = scattered(graph_cells().TGCN2(X, 3, batch_size=B))
    return Recurrence(module, stepwise(on_graph), inputs(B, NODES, X), torch.randn(B, NODES, 3))


@case("`AGCRN`, streams `(B, nodes, H)`", PYG_TEMPORAL, EITHER)
def agcrn() -> Recurrence:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = scattered(graph_cells().AGCRN(NODES, X, 2, 2, 3), 0.1)
            self.nodes = nn.Parameter(torch.randn(NODES, 3))

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = self.cell(x, self.nodes, h)
            return h, h

    return Recurrence(Embedded(), stepwise(by_call), inputs(B, NODES, X), torch.randn(B, NODES, 2))


@case("`DCRNN`, state `(1, nodes, H)`", PYG_TEMPORAL, EITHER, around=float64_by_default)
def dcrnn() -> Recurrence:
    def step(module: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = module(x, EDGES, WEIGHTS.to(x.dtype), h[0]).unsqueeze(0)
        return h, h

    module = scattered(graph_cells().DCRNN(X, 3, 2), 0.1)
    return Recurrence(module, stepwise(step), inputs(NODES, X), torch.randn(1, NODES, 3))


def evolve_gcn(nodes_as_streams: bool) -> Recurrence:
    class Below(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph, self.cell = graph_cells().EvolveGCNO(X), nn.GRUCell(X if nodes_as_streams else NODES * X, H)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = self.cell(self.graph(x, EDGES, WEIGHTS.to(x.dtype)).reshape(len(h), -1), h)
            return h, h

    def begin(module: nn.Module) -> None:
        module.graph.reinitialize_weight()

    def detach(module: nn.Module) -> None:
        module.graph.weight = module.graph.weight.detach()

    state = torch.randn(NODES if nodes_as_streams else 1, H)
    return Recurrence(Below(), stepwise(by_call), inputs(NODES, X), state, begin=begin, detach=detach)


EVOLVING = {
    "refusal": r"\bgraph\.weight\b",
    "remark": "keeps the weight that it evolves inside; torch_sparse, whose type it names, may be absent",
}
case("`EvolveGCNO` below a GRU of the whole graph", PYG_TEMPORAL, REFUSED, **EVOLVING)(lambda: evolve_gcn(False))
case("`EvolveGCNO` below a GRU of each node", PYG_TEMPORAL, REFUSED, **EVOLVING)(lambda: evolve_gcn(True))
