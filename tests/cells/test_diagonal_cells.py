"""The ready diagonal cells against their papers' formulas, written out independently, and their long-run stability."""

import math

import pytest
import torch
from diagonal_oracle import inputs, make_cell

from sparse_rtrl import LRUCell, MambaCell, RetentionCell, RWKVCell


def test_lru_is_the_power_sum_of_its_paper():
    """``h_t = Σ_s λ^{t-s} γ B x_s`` with real arithmetic of modulus and phase."""
    cell, x = make_cell("lru"), inputs(7, 1)
    outputs, _ = cell.unroll(x, cell.initial_state(1))
    modulus, phase = torch.exp(-torch.exp(cell.nu)), torch.exp(cell.theta)
    t = 6
    real, imag = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for s in range(t + 1):
        b_real, b_imag = (torch.exp(cell.gamma) * (cell.B[..., part] @ x[s, 0]) for part in (0, 1))
        size, angle = modulus ** (t - s), phase * (t - s)
        real = real + size * (torch.cos(angle) * b_real - torch.sin(angle) * b_imag)
        imag = imag + size * (torch.cos(angle) * b_imag + torch.sin(angle) * b_real)
    readout = cell.readout
    expected = readout.real @ real - readout.imag @ imag + readout.skip @ x[t, 0]
    torch.testing.assert_close(outputs[t, 0], expected, rtol=1e-10, atol=1e-12)


def test_lru_starts_on_its_ring():
    torch.manual_seed(0)
    cell = LRUCell(2, 2000, 2, r_min=0.4, r_max=0.8, max_phase=0.5)
    eigenvalues = cell.eigenvalues().detach()
    assert 0.4 <= float(eigenvalues.abs().min()) < 0.42 and 0.78 < float(eigenvalues.abs().max()) <= 0.8
    assert 0 < float(eigenvalues.angle().min()) and 0.49 < float(eigenvalues.angle().max()) <= 0.5
    # Uniform on the ring: half of the area lies inside the radius sqrt((0.4^2 + 0.8^2) / 2).
    inside = (eigenvalues.abs() < math.sqrt((0.4**2 + 0.8**2) / 2)).float().mean()
    assert 0.45 < float(inside) < 0.55
    torch.testing.assert_close(torch.exp(cell.gamma).detach() ** 2 + eigenvalues.abs() ** 2, torch.ones(2000))


def test_elstm_is_the_recurrence_of_its_paper():
    cell, x = make_cell("elstm"), inputs(6, 2)
    outputs, state = cell.unroll(x, cell.initial_state(2))
    c = torch.zeros(2, 5, dtype=torch.float64)
    gate = cell.readout.gate
    for t in range(6):
        f = 1 / (1 + torch.exp(-(x[t] @ cell.forget.weight.T + cell.forget.bias + cell.forget_peephole * c)))
        z = torch.tanh(x[t] @ cell.content.weight.T + cell.content.bias + cell.content_peephole * c)
        c = f * c + (1 - f) * z
        o = torch.sigmoid(x[t] @ gate.weight[:, :3].T + c @ gate.weight[:, 3:].T + gate.bias)
        expected = (o * c) @ cell.readout.linear.weight.T + cell.readout.linear.bias
        torch.testing.assert_close(outputs[t], expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(state, c, rtol=1e-11, atol=1e-13)


def rotated(rows, angles):
    """Rows ``(T, d)`` turned by their position: numbers ``j`` and ``j + d / 2`` of row ``t`` by ``t θ_j``."""
    turns = torch.arange(len(rows), dtype=rows.dtype).unsqueeze(1) * angles
    a, b = rows.chunk(2, 1)
    return torch.cat((a * turns.cos() - b * turns.sin(), a * turns.sin() + b * turns.cos()), 1)


@pytest.mark.parametrize("name", ["retention", "linear attention", "retention, rotated", "retention, token shift"])
def test_retention_is_the_parallel_form_of_its_paper(name):
    """``(Q K^T ⊙ D) V`` with ``D[t, s] = γ^{t-s}`` for ``s <= t``, queries and keys turned by their position."""
    cell, x = make_cell(name), inputs(8, 1)
    outputs, _ = cell.unroll(x, cell.initial_state(1))
    size = cell.state_shape[2]
    of_keys = torch.cat((torch.zeros_like(x[:1]), x[:-1])) if name == "retention, token shift" else x
    parts = []
    for head in range(cell.state_shape[0]):
        rows = slice(head * size, (head + 1) * size)
        sources = (x, cell.readout.query), (of_keys, cell.key), (x, cell.value)
        Q, K, V = (source[:, 0] @ linear.weight[rows].T for source, linear in sources)
        if cell.angle is not None:
            Q, K = rotated(Q, cell.angle[head]), rotated(K, cell.angle[head])
        gap = torch.arange(8.0, dtype=torch.float64).unsqueeze(1) - torch.arange(8.0, dtype=torch.float64)
        D = torch.where(gap >= 0, cell.decay[head] ** gap, 0.0)
        parts.append((Q @ K.T / math.sqrt(size) * D) @ V)
    retained = cell.readout.norm(torch.cat(parts, 1))
    gate = x[:, 0] @ cell.readout.gate.weight.T
    expected = (gate * torch.sigmoid(gate) * retained) @ cell.readout.linear.weight.T + cell.readout.linear.bias
    torch.testing.assert_close(outputs[:, 0], expected, rtol=1e-10, atol=1e-12)


def test_retention_turns_by_the_angles_of_xpos_and_refuses_others():
    cell = RetentionCell(2, 2, 4, 2, rotation="xpos")
    torch.testing.assert_close(cell.angle.data, torch.tensor([[1.0, 0.01], [1.0, 0.01]]))
    assert not cell.angle.requires_grad and RetentionCell(2, 2, 4, 2).angle is None
    with pytest.raises(ValueError, match=r"of shape \(2, 2\) or \(2, 1\), got \[1.0, 2.0\]"):
        RetentionCell(2, 2, 4, 2, rotation=[1.0, 2.0])
    with pytest.raises(ValueError, match="'xpos', angles or None, got 'rope'"):
        RetentionCell(2, 2, 4, 2, rotation="rope")
    with pytest.raises(ValueError, match="head_size must be even with rotation, got 3"):
        RetentionCell(2, 2, 3, 2, rotation="xpos")
    with pytest.raises(ValueError, match="needs a rotation to start from"):
        RetentionCell(2, 2, 4, 2, learn_rotation=True)


def test_retention_decays_as_in_its_paper_and_refuses_others():
    torch.testing.assert_close(RetentionCell(2, 3, 2, 2).decay.data, torch.tensor([31 / 32, 63 / 64, 127 / 128]))
    with pytest.raises(ValueError, match=r"one number or 2 numbers in \(0, 1\], got \[0.5\]"):
        RetentionCell(2, 2, 2, 2, decay=[0.5])
    with pytest.raises(ValueError, match=r"got 1.5"):
        RetentionCell(2, 2, 2, 2, decay=1.5)


def test_rwkv_is_the_weighted_sum_of_its_paper():
    """``wkv_t = (Σ_{s<t} e^{-(t-1-s) w + k_s} v_s + e^{u + k_t} v_t) / (the same without v)``."""
    cell, x = make_cell("rwkv"), inputs(7, 1)
    outputs, _ = cell.unroll(x, cell.initial_state(1))
    shifted = torch.cat((torch.zeros(1, 3, dtype=torch.float64), x[:-1, 0]))

    def mapped(linear, mix):
        return (mix * x[:, 0] + (1 - mix) * shifted) @ linear.weight.T

    readout = cell.readout
    k, v = mapped(cell.key, cell.key_mix), mapped(cell.value, cell.value_mix)
    r = torch.sigmoid(mapped(readout.receptance, readout.mix))
    w = torch.exp(cell.decay)
    for t in range(7):
        weights = [torch.exp(-(t - 1 - s) * w + k[s]) for s in range(t)] + [torch.exp(readout.bonus + k[t])]
        wkv = sum(a * v[s] for s, a in enumerate(weights)) / sum(weights)
        expected = (r[t] * wkv) @ readout.linear.weight.T + readout.linear.bias
        torch.testing.assert_close(outputs[t, 0], expected, rtol=1e-10, atol=1e-12)


def test_rwkv_does_not_overflow():
    torch.manual_seed(0)
    cell = RWKVCell(3, 4, 2)
    with torch.no_grad():
        cell.key.weight.mul_(500)
        outputs, state = cell.unroll(torch.randn(50, 2, 3), cell.initial_state(2))
    keys = cell.projected(torch.cat((torch.randn(20, 3), torch.randn(20, 3)), 1))[1][1]
    assert float(keys.detach().max()) > 88  # exp of it overflows in float32
    assert bool(torch.isfinite(outputs).all()) and bool(torch.isfinite(state[0]).all())


def test_mamba_is_the_recurrence_of_its_paper():
    cell, x = make_cell("mamba"), inputs(6, 1)
    outputs, _ = cell.unroll(x, cell.initial_state(1))
    readout = cell.readout
    h = torch.zeros(4, 3, dtype=torch.float64)
    for t in range(6):
        u = cell.input.weight @ x[t, 0]
        delta = torch.log1p(torch.exp(cell.delta_up(cell.delta_down(u))))
        B, C = cell.B(u), readout.C(u)
        y = torch.zeros(4, dtype=torch.float64)
        for d in range(4):
            h[d] = torch.exp(-delta[d] * torch.exp(cell.A_log[d])) * h[d].clone() + delta[d] * B * u[d]
            y[d] = (h[d] * C).sum() + readout.skip[d] * u[d]
        z = readout.gate.weight @ x[t, 0]
        expected = readout.linear(z * torch.sigmoid(z) * y)
        torch.testing.assert_close(outputs[t, 0], expected, rtol=1e-10, atol=1e-12)


def test_mamba_starts_with_the_steps_of_its_paper():
    torch.manual_seed(0)
    cell = MambaCell(2, 500, 2, state_size=4)
    delta = torch.nn.functional.softplus(cell.delta_up.bias).detach()
    assert 1e-3 <= float(delta.min()) < 1.2e-3 and 0.08 < float(delta.max()) <= 0.1 + 1e-6
    torch.testing.assert_close(-torch.exp(cell.A_log[7]), -torch.arange(1.0, 5.0))


@pytest.mark.parametrize("r", [(0.9, 0.9), (-0.1, 0.5), (0.5, 1.0)])
def test_lru_refuses_other_rings(r):
    with pytest.raises(ValueError, match="0 <= r_min < r_max < 1"):
        LRUCell(2, 2, 2, r_min=r[0], r_max=r[1])
