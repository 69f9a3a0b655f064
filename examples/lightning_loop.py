"""Truncated BPTT with PyTorch Lightning's manual optimization, made exact by ``Carry``.

``python examples/lightning_loop.py --help``; needs ``pip install lightning``. A batch is one segment of every stream.
The state stays in the module between batches; ``carry`` stands between the forward pass and ``manual_backward``.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning
import torch
from char_stream import segments
from tbptt_loop import Model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sparse_rtrl import Carry


class Segments(IterableDataset):
    """Segments of the text, in order."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def __iter__(self):
        """Yield inputs and next bytes, ``(n, B)`` each."""
        return segments(self.options.size, self.options.batch, self.options.segment)


class OnlineModel(lightning.LightningModule):
    """A byte model trained segment by segment."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.model = Model(options.hidden)
        self.automatic_optimization = False
        self.losses: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on everything that is trained."""
        return torch.optim.Adam(self.model.parameters(), lr=self.options.learning_rate)

    def on_train_epoch_start(self) -> None:
        """Start the streams anew; parameters are on their device by now."""
        self.carry = Carry(self.model)
        self.h = self.carry(torch.zeros(self.options.batch, self.options.hidden, device=self.device))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """One segment: forward, carry, backward, step."""
        x, y = batch
        logits, h = self.model(x, self.h)
        self.h = self.carry(h)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        self.manual_backward(loss)
        self.clip_gradients(self.optimizers(), gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        self.optimizers().step()
        self.optimizers().zero_grad()
        self.losses.append(float(loss.detach()))


def main(arguments: list[str] | None = None) -> list[float]:
    """Train one epoch; the losses of every segment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--segment", type=int, default=16)
    parser.add_argument("--size", type=int, default=40_000, help="bytes of text")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(0, verbose=False)
    module = OnlineModel(options)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, DataLoader(Segments(options), batch_size=None))
    last = module.losses[-20:]
    print(f"mean loss of the last segments: {sum(last) / len(last):.3f} nats per byte")
    return module.losses


if __name__ == "__main__":
    main()
