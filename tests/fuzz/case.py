"""What a case is, and the verdict on it: exact, refused, wrong, or crashed."""

import copy
import dis
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

import sparse_rtrl

EXACT = 1e-12
ROUNDING_OF_FLOAT32 = 2.0**-29
"""Rounding unit of float64 over that of float32."""
TRIALS = 4
"""Evaluations of BPTT whose largest error is its own."""
TIME_LIMIT = 60
"""Seconds after which a case counts as hanging."""

Gradients: TypeAlias = dict[str, Tensor]
Module = TypeVar("Module", bound=torch.nn.Module)

REFUSALS = (ValueError, TypeError, RuntimeError, FloatingPointError)
"""Types of an error that names what is not exact; which one it is does not matter here."""


@dataclass(frozen=True)
class Way:
    """How the reference is worked out.

    Attributes:
        dtype: of all arithmetic.
        truncate: cut the graph at every segment: a wrong gradient, which shows that the comparison is alive.
        trial: above 0, parameters are moved by about one rounding unit, another one for each number.
    """

    dtype: torch.dtype = torch.float64
    truncate: bool = False
    trial: int = 0

    def of(self, module: Module) -> Module:
        """A copy of a module in this precision, complex parameters too."""
        module = copy.deepcopy(module)
        generator = torch.Generator().manual_seed(self.trial)
        for owner in module.modules():
            for tensor in (*owner._parameters.values(), *owner._buffers.values()):
                if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
                    continue
                wide = self.dtype.to_complex() if tensor.is_complex() else self.dtype
                tensor.data = tensor.data.to(wide)
                if self.trial:
                    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.data += tensor.data * ((noise - 0.5) * 2 * torch.finfo(self.dtype).eps).to(self.dtype)
        return module


@dataclass
class Case:
    """One comparison.

    Attributes:
        kind: what is compared, in a few words; failures are grouped by it.
        learn: the gradient from the library; it counts what it exercised.
        reference: the gradient by plain autograd through the whole past.
        must_be_exact: whether a refusal is not an answer.
        reasons: words that the message of a legitimate refusal may hold although the case must be exact otherwise.
        plain: the same loop with the state detached instead of carried; where torch itself refuses that, it may refuse
            the carried one as well. None where there is no such loop.
        float32: whether the library computes in float32.
    """

    kind: str
    learn: Callable[[Counter[str]], Gradients]
    reference: Callable[[Way], Gradients]
    must_be_exact: bool = True
    reasons: tuple[str, ...] = ()
    plain: Callable[[], Any] | None = None
    float32: bool = False


@dataclass
class Outcome:
    """The verdict on a case; ``share`` is the error as a share of what is allowed."""

    seed: int
    family: str
    kind: str
    verdict: str
    error: float = 0.0
    share: float = 0.0
    detail: str = ""
    must_be_exact: bool = True
    seconds: float = 0.0
    exercised: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.verdict in ("wrong", "crash")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def gradients_of(module: torch.nn.Module) -> Gradients:
    """``.grad`` by name, zeros where there is none; each parameter under its first name."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().to_dense().clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def added(one: Gradients, other: Gradients) -> Gradients:
    return {name: g + other[name] if name in other else g for name, g in one.items()}


def worst(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """Largest ``‖g − g_ref‖ / max(‖g_ref‖, 1e-3 · ‖g_ref over all‖)`` and whose it is; NaN counts as infinite."""
    if not expected:
        return 0.0, ""
    norms = {name: float(torch.linalg.vector_norm(g)) for name, g in expected.items()}
    whole = sum(n * n for n in norms.values()) ** 0.5
    if not whole > 0:
        raise AssertionError("the reference gradient is zero: this case compares nothing")
    errors = []
    for name, g in expected.items():
        wide = torch.complex128 if g.is_complex() else torch.float64
        difference = float(torch.linalg.vector_norm(found[name].to(wide) - g.to(wide)))
        error = difference / max(norms[name], 1e-3 * whole)
        errors.append((error if error == error else float("inf"), name))
    return max(errors)


def judge(seed: int, family: str, make: Callable[[], Case]) -> Outcome:
    """Run one case."""
    counts: Counter[str] = Counter()
    outcome = Outcome(seed, family, "made", "crash")
    started, default = time.perf_counter(), torch.get_default_dtype()
    previous = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(TIME_LIMIT)
    try:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            _judge(make(), outcome, counts)
        counts["dense path"] += sum("dense one is computed instead" in str(note.message) for note in notes)
    except Exception as error:  # in the reference, or in the making of the case: a fault of this tool
        outcome.verdict, outcome.detail = "crash", f"not in the library: {_described(error)}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        torch.set_default_dtype(default)
    outcome.seconds = time.perf_counter() - started
    outcome.exercised = {name: count for name, count in counts.items() if count}
    return outcome


def _judge(case: Case, outcome: Outcome, counts: "Counter[str]") -> None:
    outcome.kind, outcome.must_be_exact = case.kind, case.must_be_exact
    try:
        torch.manual_seed(outcome.seed)
        found = case.learn(counts)
    except Exception as error:
        outcome.detail = _described(error)
        if is_refusal(error):
            outcome.verdict = "refused"
            outcome.must_be_exact &= not any(reason in str(error) for reason in case.reasons)
        elif case.plain is not None and _refuses(case.plain, outcome.seed):
            outcome.verdict, outcome.must_be_exact = "refused", False
            outcome.detail = f"torch refuses the loop with detach as well: {type(error).__name__}: {error}"
        return
    torch.manual_seed(outcome.seed)
    expected = case.reference(Way())
    error, name = worst(found, expected)
    outcome.error = error
    limit = EXACT if not case.float32 else 0.0
    if error > limit:  # how well does BPTT know the gradient itself?
        own = 0.0
        for trial in range(TRIALS):
            torch.manual_seed(outcome.seed)
            own = max(own, worst(case.reference(Way(torch.float32, trial=trial)), expected)[0])
        limit = max(limit, 2 * own * (1.0 if case.float32 else ROUNDING_OF_FLOAT32))
    if case.float32:
        limit += torch.finfo(torch.float32).eps
    outcome.share = error / limit
    outcome.verdict = "exact" if error <= limit else "wrong"
    if error > limit:
        outcome.detail = f"{name}: error {error:.1e}, limit {limit:.1e}"


def is_refusal(error: Exception) -> bool:
    """Whether the library itself raised the error, by a raise statement, and it is no slip of the code."""
    if not isinstance(error, REFUSALS) or isinstance(error, (NotImplementedError, UnicodeError, RecursionError)):
        return False
    if isinstance(error, sparse_rtrl.ContractError):
        return True
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    inside = "/sparse_rtrl/" in code.co_filename
    return inside and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _refuses(loop: Callable[[], Any], seed: int) -> bool:
    torch.manual_seed(seed)
    try:
        loop()
    except RuntimeError:
        return True
    return False


def _hangs(*_: Any) -> None:
    raise RuntimeError(f"no answer after {TIME_LIMIT} seconds")


def _described(error: Exception) -> str:
    """Type, message and place of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/sparse_rtrl/" in f.filename or "/fuzz/" in f.filename]
    place = f" ({ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{place}"
