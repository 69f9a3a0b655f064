"""Stacks of diagonal cells: what the per-layer approximation gets right, and what only the joint influence does."""

import copy

import pytest
import torch
from diagonal_oracle import bptt, gradients_of, inputs
from oracle import cotangents, worst_error

from sparse_rtrl import RTRL, Carry, DiagonalStack, ELSTMCell, LRUCell, PerLayerApproximation, RWKVCell, estimate


def make_stack():
    torch.manual_seed(0)
    cells = [LRUCell(4, 3, 4, r_min=0.5), RWKVCell(4, 3, 4), ELSTMCell(4, 3, 4)]
    return DiagonalStack(3, cells, 2).double()


def learn(learner, x, c, segment, resets=None):
    learner.stack.zero_grad(set_to_none=True)
    for start in range(0, len(x), segment):
        if resets and start in resets:
            learner.reset(resets[start])
        (learner.unroll(x[start : start + segment]) * c[start : start + segment]).sum().backward()
    return gradients_of(learner.stack)


def test_the_uppermost_layer_is_exact_and_the_others_are_named_approximate():
    stack, x, c = make_stack(), inputs(12, 3), cotangents(12, 3, density=1.0)
    resets = {4: torch.tensor([True, False, False])}
    expected = bptt(stack, x, c, resets)
    found = learn(PerLayerApproximation(stack, 3), x, c, 1, resets)
    exact = {n for n in expected if n.startswith(("cells.2.", "mixings.2.", "head."))}
    assert worst_error({n: found[n] for n in exact}, {n: expected[n] for n in exact}) <= 1e-12
    below = {n: expected[n] for n in expected if n.startswith("cells.0.") and "readout" not in n}
    assert worst_error(found, below) > 1e-2
    # It is closer to the gradient than truncation at the same segment.
    truncated = bptt(stack, x, c, resets, truncate=1)

    def cosine(one):
        a, b = (torch.cat([g[n].flatten() for n in below]) for g in (one, expected))
        return float(a @ b / a.norm() / b.norm())

    assert cosine(truncated) < cosine(found) < 1 - 1e-6


def test_one_segment_is_bptt_and_resuming_is_bit_for_bit():
    stack, x, c = make_stack(), inputs(10, 2), cotangents(10, 2)
    assert worst_error(learn(PerLayerApproximation(stack, 2), x, c, 10), bptt(stack, x, c)) <= 1e-12
    one = PerLayerApproximation(stack, 2, commit_every=3)
    learn(one, x[:4], c[:4], 1)
    other = PerLayerApproximation(copy.deepcopy(stack), 2, commit_every=3)
    other.load_state_dict(one.state_dict())
    first, second = (learn(each, x[4:], c[4:], 2) for each in (one, other))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert one.kept_bytes > 0


@pytest.mark.filterwarnings("ignore:.*is not captured as factors")
def test_the_joint_influence_is_exact_and_its_cost_is_shown():
    stack, x, c = make_stack(), inputs(8, 2), cotangents(8, 2)
    carry = Carry(stack)
    state = carry(stack.initial_state(2))
    stack.zero_grad(set_to_none=True)
    for t in range(8):
        out, state = stack(x[t], state)
        if t == 0:
            # Complex entries count twice; the previous input of the token shift is part of the state.
            assert carry.estimate(state).hidden_size == 2 * 3 + (3 * 3 + 4) + 3
        state = carry(state)
        (out * c[t]).sum().backward()
    assert worst_error(gradients_of(stack), bptt(stack, x, c)) <= 1e-12


def test_misuse_is_named():
    stack = make_stack()
    with pytest.raises(TypeError, match=r"Carry\(stack\).*PerLayerApproximation"):
        RTRL(stack, 2)
    with pytest.raises(TypeError, match=r"for other modules and stacks see Carry\(module\)\.estimate"):
        estimate(stack, 2)
    with pytest.raises(TypeError, match="stack must be a DiagonalStack, got LRUCell"):
        PerLayerApproximation(LRUCell(2, 3, 2), 2)
    with pytest.raises(ValueError, match=r"cells\[1\] must have input_size and output_size 2, got 3 and 2"):
        DiagonalStack(2, [LRUCell(2, 3, 2), LRUCell(3, 3, 2)], 2)
    with pytest.raises(ValueError, match="commit_every must be an int of at least 1, got 0"):
        PerLayerApproximation(stack, 2, commit_every=0)
