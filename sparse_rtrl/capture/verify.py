"""A check that never sleeps: a random sample of segments is compared with an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparse_rtrl.errors import DisagreementError

Verify: TypeAlias = Literal["sample", "always", "never"] | int
"""Which segments are compared: a random sample of them, all, none, or one in this many."""

SAMPLE = 64
"""``"sample"`` compares one segment in this many, on average."""

PROBE_SCALE = -(2.0**20)
"""What a probe of the backward pass is scaled by. A power of two, so that a linear backward pass scales exactly;
negative, so that one that depends on the sign is noticed too."""

SQUARING = ("LinalgMatrixExp",)
"""Beginnings of the names of nodes whose backward pass squares what it gets: digits of so large a probe are lost."""

STATE = "the state"
OTHER_STREAMS = "the states of other streams"


class Verifier:
    """Decides which segments are compared with an ordinary backward pass, and judges what was found.

    A segment is drawn with probability ``1 / n``, so a fault that is there in every segment stays unnoticed for ``k``
    segments with probability ``(1 - 1 / n) ** k``. The draws come from a generator of its own, so that verifying
    changes no other random number.

    A segment in which a hook was registered is always compared: hooks change gradients, and graphs do not show them.

    On a CUDA device the verdict stays on the device until :meth:`settle` reads it, so that no step waits for the host.

    Args:
        verify: see :data:`Verify`.

    Raises:
        ValueError: if ``verify`` is none of these.
    """

    def __init__(self, verify: Verify = "sample") -> None:
        number = isinstance(verify, int) and not isinstance(verify, bool) and verify >= 1
        if verify not in ("sample", "always", "never") and not number:
            raise ValueError(f"verify must be 'sample', 'always', 'never' or an int of at least 1, got {verify!r}")
        self.verify = verify
        self._one_in = verify if isinstance(verify, int) else {"sample": SAMPLE, "always": 1, "never": 0}[verify]
        self._generator = torch.Generator().manual_seed(0)
        self._source = self._generator
        self._pending: list[tuple[Tensor, list[str], int, int, str]] = []
        self.compared = 0
        """How many segments were drawn and compared."""
        self._hooks = 0
        self.ignore_hooks()

    def ignore_hooks(self) -> None:
        """Do not count the hooks that were registered up to now."""
        self._hooks = RemovableHandle.next_id  # counts every registration of any hook in the process

    @property
    def hooked(self) -> bool:
        """Whether a hook was registered since the last segment."""
        return self._hooks != RemovableHandle.next_id

    def due(self) -> bool:
        """Whether the next segment is compared: drawn, or hooks were registered in it."""
        hooked = self.hooked
        self.ignore_hooks()
        drawn = self._one_in == 1
        if self._one_in > 1:
            drawn = int(torch.randint(self._one_in, (), device="cpu", generator=self._generator)) == 0
        # A comparison because of hooks must not change later draws: a resumed run may have other hooks.
        self._source = self._generator if drawn or not hooked else torch.Generator(device="cpu").manual_seed(1)
        return drawn or hooked

    def choose(self, count: int) -> int:
        """Draw one of ``count`` steps."""
        return int(torch.randint(count, (), device="cpu", generator=self._source))

    def cotangent(self, state: Tensor) -> tuple[int, Tensor]:
        """A randomly chosen stream, and a random cotangent that is zero for all others.

        It is larger than gradients are, so that a backward pass that clips them shows; a linear one scales exactly.

        Args:
            state: the state that a segment ended with, ``(B, ...)``, for shape, dtype and device.

        Returns:
            Index of the stream, and the cotangent, shaped like ``state``.
        """
        stream = int(torch.randint(state.shape[0], (), device="cpu", generator=self._source))
        real = state.dtype.to_real() if state.is_complex() else state.dtype
        shape = (*state.shape[1:], 2) if state.is_complex() else state.shape[1:]
        drawn = torch.randn(shape, device="cpu", generator=self._source, dtype=torch.float64).to(state.device, real)
        out = torch.zeros_like(state, requires_grad=False)
        out[stream] = PROBE_SCALE * (torch.view_as_complex(drawn) if state.is_complex() else drawn)
        return stream, out

    def compare(
        self,
        step: int,
        stream: int,
        found: Mapping[str, Tensor],
        expected: Mapping[str, Tensor | None],
        tolerance: float,
        reason: str,
    ) -> None:
        """Compare what was captured with what an ordinary backward pass gives.

        Args:
            step: number of the segment or step, for messages.
            stream: the stream that the cotangent was for.
            found: products, any shapes, of the cotangent and the captured Jacobians by name, :data:`STATE` and
                :data:`OTHER_STREAMS` among them.
            expected: the same from autograd, in equal shapes; None where there is no path.
            tolerance: largest error relative to the largest entry of a value, or to a hundredth of that of all. For
                :data:`OTHER_STREAMS` it is zero: streams that do not influence each other have no gradient at all.
            reason: likely reasons and the remedy, one or more sentences.

        Raises:
            DisagreementError: naming step, stream and values; on a CUDA device not before :meth:`settle`.
        """
        self.compared += self._source is self._generator
        names = list(expected)
        if not names:
            return
        errors, sizes = [], []
        for name in names:
            mine, its = found[name], expected[name]
            errors.append((mine if its is None else mine - its).abs().amax() if mine.numel() else mine.new_zeros(()))
            sizes.append(
                mine.new_zeros(()) if its is None or not its.numel() else its.abs().amax().to(errors[-1].dtype)
            )
        error, size = torch.stack([e.double() for e in errors]), torch.stack([s.double() for s in sizes])
        # Where autograd's own gradient is not finite there is nothing to compare with; it is refused elsewhere.
        limit = tolerance * torch.maximum(size, 1e-2 * size.max())
        limit *= torch.tensor([name != OTHER_STREAMS for name in names], device=limit.device)  # not even rounding
        bad = (error > limit) & torch.isfinite(size.sum())
        # NaN compares as false, but a captured NaN beside a finite gradient is a disagreement.
        bad |= torch.isnan(error) & torch.isfinite(size.sum())
        if bad.is_cuda:
            self._pending.append((bad, names, step, stream, reason))
        elif bool(bad.any()):
            _refuse(bad, names, step, stream, reason)

    def settle(self) -> None:
        """Read the verdicts that are still on a device.

        Raises:
            DisagreementError: for the first that disagreed.
        """
        pending, self._pending = self._pending, []
        for bad, names, step, stream, reason in pending:
            if bool(bad.any()):
                _refuse(bad, names, step, stream, reason)

    def state_dict(self) -> dict[str, Any]:
        """What decides which segments are compared next; verdicts are read first."""
        self.settle()
        return {"generator": self._generator.get_state(), "compared": self.compared}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._pending = []
        self._generator.set_state(state["generator"].cpu())
        self.compared = state["compared"]

    def __getstate__(self) -> dict[str, Any]:
        return {"verify": self.verify, **self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["verify"])  # type: ignore[misc]
        self.load_state_dict(state)


def tolerance_of(dtype: torch.dtype, squaring: bool = False) -> float:
    """Largest relative error that rounding in arithmetic of a dtype explains; of a probe, if ``squaring`` is in it."""
    eps = torch.finfo(dtype).eps
    return min(0.2, 50 * max(eps**0.75, abs(PROBE_SCALE) * eps if squaring else 0.0))


def _refuse(bad: Tensor, names: list[str], step: int, stream: int, reason: str) -> None:
    wrong = [name for name, disagrees in zip(names, bad.tolist(), strict=True) if disagrees]
    raise DisagreementError(step, stream, wrong, reason)
