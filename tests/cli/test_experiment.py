import pytest
import torch

from sparse_rtrl.cli.experiment import RunConfig, build_evaluation_task, build_stream


@pytest.mark.parametrize("seed", [0, 3, 2**31, 2**32 - 1])
def test_a_run_is_not_scored_on_the_stream_it_trained_on(seed):
    config = RunConfig(length=8, batch_size=16, eval_sequences=16, seed=seed)
    trained_on = next(iter(build_stream(config))).x
    scored_on = build_evaluation_task(config, 8).sample().x
    assert scored_on.shape == trained_on.shape
    # Of 16 x 8 draws, those that agree by chance: far from all, and far from all fillers.
    agreement = (scored_on.argmax(-1) == trained_on.argmax(-1))[1:-1].float().mean()
    assert agreement < 0.5


def test_every_method_of_a_seed_is_scored_on_the_same_sequences():
    first, second = (build_evaluation_task(RunConfig(method=m, length=8), 8).sample().x for m in ("bptt", "tbptt"))
    assert torch.equal(first, second)
