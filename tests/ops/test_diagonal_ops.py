"""Operations of diagonal recurrences against dense arithmetic in float64, and as a gradient against autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_rtrl.ops import dispatch, reference

compiled = pytest.mark.skipif(
    bool(dispatch.compiled_problem), reason=f"no compiled operations: {dispatch.compiled_problem}"
)
DTYPES = (torch.float64, torch.complex128)
ALL_DTYPES = (torch.float32, *DTYPES, torch.complex64)


def problem(batch=3, rows=5, tau=2, columns=7, dtype=torch.float64, loss=True, seed=0):
    """Arguments of ``diagonal_update_``: P, decay, delta, z, and g and u if there is a loss."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    arguments = [
        randn(batch, rows, columns),
        randn(batch, rows),
        randn(batch, rows, tau),
        randn(batch, tau, columns, dtype=dtype.to_real()),
    ]
    return [*arguments, randn(rows, columns), randn(batch, rows)] if loss else arguments


def expected(P, decay, delta, z, g=None, u=None):
    """Influence and gradient after an update, entry by entry in double precision."""
    new = P.new_empty(P.shape, dtype=torch.complex128)
    gradient = None if g is None else g.to(torch.complex128, copy=True)
    for b, r in torch.cartesian_prod(torch.arange(P.shape[0]), torch.arange(P.shape[1])).tolist():
        new[b, r] = decay[b, r] * P[b, r]
        for step in range(delta.shape[2]):
            new[b, r] += delta[b, r, step] * z[b, step]
        if gradient is not None:
            gradient[r] += u[b, r] * P[b, r].conj()
    return [new] if gradient is None else [new, gradient]


def norm_error(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0, 1, 3])
@pytest.mark.parametrize("columns", [1, 7])
@pytest.mark.parametrize("loss", [True, False])
def test_reference(dtype, tau, columns, loss):
    arguments = problem(tau=tau, columns=columns, dtype=dtype, loss=loss)
    exact = expected(*arguments)
    reference.diagonal_update_(*arguments)
    assert norm_error(arguments[0], exact[0]) < 1e-14
    if loss:
        assert norm_error(arguments[4], exact[1]) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_comparison_can_fail(dtype):
    """Each part of the update, left out or taken in the wrong order, shows."""
    P, decay, delta, z, g, u = problem(dtype=dtype)
    new, gradient = expected(P, decay, delta, z, g, u)
    assert norm_error(expected(P, decay * 0 + 1, delta, z)[0], new) > 1e-2
    assert norm_error(expected(P, decay, delta[:, :, :1], z[:, :1])[0], new) > 1e-2
    assert norm_error(expected(new, decay, delta, z, g, u)[1], gradient) > 1e-2  # the loss of the influence after it
    if dtype.is_complex:
        assert norm_error(expected(P.conj(), decay, delta, z, g, u)[1], gradient) > 1e-2
        assert norm_error(expected(P, decay.conj(), delta, z)[0], new) > 1e-2


def recurrence(x, weight, scale, logit, dtype):
    """States of ``h <- a ⊙ h + scale ⊙ (W x)``, a holomorphic function of its complex parameters."""
    decay = torch.exp(logit)
    h = torch.zeros(x.shape[1], len(logit), dtype=dtype)
    states = []
    for x_t in x.to(dtype):
        h = decay * h + scale * (x_t @ weight.t())
        states.append(h)
    return torch.stack(states), decay


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 4])
def test_gradient_of_a_recurrence(dtype, length):
    """Segments of one step or several: the gradients of a weight, an element-wise and a real parameter."""
    torch.manual_seed(0)
    steps, batch, rows, columns = 12, 3, 5, 4
    x = torch.randn(steps, batch, columns, dtype=torch.float64)
    weight = torch.randn(rows, columns, dtype=dtype, requires_grad=True)
    logit = (0.3 * torch.randn(rows, dtype=dtype) - 0.4).requires_grad_()
    scale = torch.randn(rows, dtype=torch.float64, requires_grad=True)
    readout = torch.randn(steps, batch, rows, dtype=dtype)  # u of the loss at each step
    states, decay = recurrence(x, weight, scale, logit, dtype)
    ends = range(length - 1, steps, length)
    loss = sum((states[t].conj() * readout[t]).real.sum() for t in ends)
    exact = torch.autograd.grad(loss, (weight, logit, scale))

    P, P_logit, P_scale = (torch.zeros(batch, rows, j, dtype=dtype) for j in (columns, 1, 1))
    found = [torch.zeros(rows, j, dtype=dtype) for j in (columns, 1, 1)]
    last = steps - length  # losses of the last segment come from its end, after the last update
    with torch.no_grad():
        one = x.new_ones(batch, length, 1)
        for start in range(0, steps, length):
            powers = decay ** torch.arange(length - 1, -1, -1).unsqueeze(1)  # (length, R), of the steps still to come
            span = slice(start, start + length)
            before = torch.cat((states[start - 1 : start], states[start : start + length - 1]))
            before = torch.cat((torch.zeros_like(states[:1]), states[: length - 1])) if start == 0 else before
            delta = (powers * scale).t().expand(batch, -1, -1)
            by_logit = (powers.unsqueeze(1) * decay * before).permute(1, 2, 0)
            by_scale = (powers.unsqueeze(1) * (x[span].to(dtype) @ weight.t())).permute(1, 2, 0)
            u = readout[start - 1] if start else torch.zeros(batch, rows, dtype=dtype)
            for influence, d, z, g in zip(
                (P, P_logit, P_scale),
                (delta, by_logit, by_scale),
                (x[span].transpose(0, 1), one, one),
                found,
                strict=True,
            ):
                dispatch.diagonal_update_(influence, (decay**length).expand(batch, -1), d, z, g, u)
        for g, influence in zip(found, (P, P_logit, P_scale), strict=True):
            dispatch.diagonal_loss_(g, influence, readout[last + length - 1])
    assert norm_error(found[0], exact[0]) < 1e-12
    assert norm_error(found[1].squeeze(1), exact[1]) < 1e-12
    real = found[2].squeeze(1).real
    assert norm_error(real, exact[2]) < 1e-12 and min(float(e.norm()) for e in exact) > 1e-2
    if dtype.is_complex:
        assert norm_error(found[0].conj().resolve_conj(), exact[0]) > 1e-2


def test_gradient_and_its_vector_come_together():
    P, decay, delta, z, g, u = problem()
    with pytest.raises(ValueError, match="g without u"):
        reference.diagonal_update_(P, decay, delta, z, g)
    with pytest.raises(ValueError, match="u without g"):
        reference.diagonal_update_(P, decay, delta, z, None, u)


def guarded(tensor):
    """A copy that lies between NaN in memory, and the flat tensor that holds both."""
    flat = torch.full((tensor.numel() + 16,), torch.nan, dtype=tensor.dtype)
    inside = flat[8:-8].view(tensor.shape)
    inside.copy_(tensor)
    return inside, flat


def assert_as_good_as_reference(arguments, dtype, changed=(0, 4), name="diagonal_update_"):
    """Error at most twice the reference's own in that dtype; in double precision, that in single times the ratio."""

    def cast(values, real):
        return [v.to(real.to_complex() if v.is_complex() else real, copy=True) for v in values]

    def double(values):
        return cast(values, torch.float64)

    single = cast(arguments, torch.float32)
    given = cast(arguments, dtype.to_real())
    results = []
    for values in (double(given), [s.clone() for s in single], double(single)):
        getattr(reference, name)(*values)
        results.append(values)
    eps = torch.finfo(dtype).eps
    ratio = eps / torch.finfo(torch.float32).eps
    found, guards = zip(*(guarded(v) for v in given), strict=True)
    getattr(dispatch, name)(*found)
    for i in range(len(found)):
        exact, own, own_exact = (r[i] for r in results)
        if i in changed:
            own_error = (own - own_exact).norm() * ratio
            assert found[i].dtype == dtype and (found[i] - exact).norm() <= 2 * own_error + eps * exact.norm()
        else:
            assert torch.equal(found[i], given[i])
        assert guards[i][:8].isnan().all() and guards[i][-8:].isnan().all()


@compiled
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@given(data=st.data())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_compiled(dtype, data):
    draw = data.draw
    rows, columns = draw(st.sampled_from([1, 3, 4, 9, 70])), draw(st.sampled_from([1, 2, 7, 16, 33, 130]))
    batch, tau = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    double = torch.complex128 if dtype.is_complex else torch.float64
    arguments = problem(batch, rows, tau, columns, double, draw(st.booleans()), draw(st.integers(0, 99)))
    assert_as_good_as_reference(arguments, dtype)
    if len(arguments) == 6:
        P, _, _, _, g, u = arguments
        assert_as_good_as_reference([g, P, u], dtype, (0,), "diagonal_loss_")


@compiled
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(300, 700), (50_000, 1), (9, 20_001)])
def test_threads_do_not_change_a_bit(dtype, rows, columns):
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        arguments = problem(2, rows, 1, columns, dtype)
        dispatch.diagonal_update_(*arguments)
        results.append(arguments)
    torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][4], results[1][4])
    assert norm_error(results[0][0], expected_by_reference(problem(2, rows, 1, columns, dtype))) < 1e-6


def expected_by_reference(arguments):
    reference.diagonal_update_(*arguments)
    return arguments[0]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype):
    """What is only read may lie anyhow in memory and be conjugated lazily; what is changed is contiguous."""
    P, decay, delta, z, g, u = problem(dtype=dtype)
    new, gradient = expected(P, decay, delta, z, g, u)
    strange = [decay.t().contiguous().t(), delta[..., [0, 0, 1, 1]][..., ::2], z.transpose(1, 2).contiguous().mT]
    dispatch.diagonal_update_(P, *strange, g, u.conj().resolve_conj().conj())
    assert norm_error(P, new) < 1e-14 and norm_error(g, gradient) < 1e-14


@compiled
@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, lambda t: t.mT, "P must be contiguous"),
        (0, lambda t: t.bfloat16(), "P must be contiguous float32.*BFloat16"),
        (1, lambda t: t[:1], r"decay must be .* of shape \(3, 5\).*\(1, 5\)"),
        (2, lambda t: t.to(torch.complex128), "delta must be"),
        (3, lambda t: t[:, :1], r"z must be .* of shape \(3, 2, 7\).*\(3, 1, 7\)"),
        (3, lambda t: t.to(torch.complex128), "z must be"),
        (4, lambda t: t.mT, r"g must be .* of shape \(5, 7\)"),
        (4, lambda t: torch.stack((t, t), 2)[..., 0], "g must be contiguous"),
        (5, lambda t: None, "g without u"),
        (5, lambda t: t[:, 1:], "u must be"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    arguments = problem()
    arguments[index] = wrong(arguments[index])
    with pytest.raises(ValueError, match=message):
        dispatch.diagonal_update_(*arguments)


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
def test_opcheck(dtype):
    tests = ("test_schema", "test_faketensor")
    arguments = problem(dtype=dtype)
    P, _, _, _, g, u = arguments
    torch.library.opcheck(torch.ops.sparse_rtrl.diagonal_update_.default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.sparse_rtrl.diagonal_update_.default, arguments[:4], test_utils=tests)
    torch.library.opcheck(torch.ops.sparse_rtrl.diagonal_loss_.default, (g, P, u), test_utils=tests)
