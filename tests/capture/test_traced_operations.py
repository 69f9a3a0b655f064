"""Operations inside a recurrent step: exact, and by the tape unless they stand in the second table."""

import pytest
import torch
import torch.nn.functional as F
from carry_oracle import EXACT, F64
from torch import nn

from sparse_rtrl import Carry
from sparse_rtrl.capture.taped import TapedSteps


class Step(nn.Module):
    """``tanh(W h + x + f(W h))``."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation
        self.W = nn.Parameter(torch.randn(8, 8, **F64) * 0.3)
        self.V = nn.Parameter(torch.randn(8, 8, 8, **F64) * 0.1)
        self.kernel = nn.Parameter(torch.randn(2, 2, 3, **F64) * 0.3)

    def forward(self, x, h):
        z = F.linear(h, self.W)
        return torch.tanh(z + x + self.operation(self, z, h, x))


def eight(pooled):
    """What was pooled, repeated and cut to eight numbers."""
    return pooled.flatten(1).repeat(1, 8)[:, :8]


def orthogonal_to(m, h):
    normal = m.W[0]
    return h - 2 * (h @ normal).unsqueeze(1) * normal / normal.square().sum()


TAPED = {
    "cumsum": lambda m, z, h, x: torch.softmax(z, 1).cumsum(1),
    "cumprod": lambda m, z, h, x: z.cumprod(1),
    "cummax": lambda m, z, h, x: z.cummax(1).values,
    "max pool": lambda m, z, h, x: eight(F.max_pool1d(z.unsqueeze(1), 2)),
    "overlapping max pool": lambda m, z, h, x: eight(F.max_pool2d(z.view(-1, 1, 2, 4), 2, 1, 1)),
    "mean pool": lambda m, z, h, x: eight(F.avg_pool1d(z.unsqueeze(1), 2)),
    "padded mean pool": lambda m, z, h, x: eight(F.avg_pool2d(z.view(-1, 1, 2, 4), (2, 2), (2, 1), (0, 1))),
    "mean pool of channels": lambda m, z, h, x: eight(F.avg_pool2d(z.view(-1, 2, 2, 2), 2)),
    "adaptive pool": lambda m, z, h, x: eight(F.adaptive_avg_pool1d(z.unsqueeze(1), 4)),
    "upsample": lambda m, z, h, x: F.interpolate(z.unsqueeze(1), scale_factor=2).squeeze(1)[:, :8],
    "upsample to a size": lambda m, z, h, x: F.interpolate(z.view(-1, 1, 2, 4), size=(3, 7)).flatten(1)[:, :8],
    "index_fill": lambda m, z, h, x: z.index_fill(1, torch.tensor([1, 4]), 0.5),
    "index by a constant": lambda m, z, h, x: z[:, torch.tensor([3, 3, 1, 0, 7, 2, 2, 2])],
    "index_put": lambda m, z, h, x: z.index_put((torch.arange(len(z)), torch.full((len(z),), 3)), h[:, 0]),
    "diagonal_scatter": lambda m, z, h, x: torch.diagonal_scatter(h.unsqueeze(2) * z.unsqueeze(1), x * z, 0, 1, 2).sum(
        1
    ),
    "diag_embed": lambda m, z, h, x: torch.diag_embed(h).sum(1) @ m.W,
    "hardshrink": lambda m, z, h, x: F.hardshrink(z, 0.1),
    "softshrink": lambda m, z, h, x: F.softshrink(z, 0.1),
    "tanhshrink": lambda m, z, h, x: F.tanhshrink(z),
    "prelu": lambda m, z, h, x: F.prelu(z, m.kernel[0, 0, :1]),
    "threshold": lambda m, z, h, x: F.threshold(z, 0.1, 0.0),
    "leaky relu": lambda m, z, h, x: F.leaky_relu(z),
    "elu": lambda m, z, h, x: F.elu(z),
    "celu": lambda m, z, h, x: F.celu(z),
    "selu": lambda m, z, h, x: F.selu(z),
    "silu": lambda m, z, h, x: F.silu(z),
    "gelu": lambda m, z, h, x: F.gelu(z),
    "mish": lambda m, z, h, x: F.mish(z),
    "softplus": lambda m, z, h, x: F.softplus(z),
    "softsign": lambda m, z, h, x: F.softsign(z),
    "hardtanh": lambda m, z, h, x: F.hardtanh(z),
    "hardswish": lambda m, z, h, x: F.hardswish(z),
    "hardsigmoid": lambda m, z, h, x: F.hardsigmoid(z),
    "logsigmoid": lambda m, z, h, x: F.logsigmoid(z),
    "glu": lambda m, z, h, x: F.glu(torch.cat([z, h], 1)),
    "erf": lambda m, z, h, x: torch.special.erf(z),
    "atan2": lambda m, z, h, x: torch.atan2(z, x),
    "pow": lambda m, z, h, x: z.abs().pow(1.5),
    "remainder": lambda m, z, h, x: z.remainder(1.0),
    "clamp": lambda m, z, h, x: z.clamp(-0.5, 0.5),
    "minimum": lambda m, z, h, x: torch.minimum(z, h),
    "max": lambda m, z, h, x: z.max(1, keepdim=True).values,
    "median": lambda m, z, h, x: z.median(1, keepdim=True).values,
    "sort": lambda m, z, h, x: z.sort(1).values,
    "topk": lambda m, z, h, x: eight(z.topk(4, 1).values),
    "take_along_dim": lambda m, z, h, x: torch.take_along_dim(z, h.argsort(1), 1),
    "prod": lambda m, z, h, x: z.prod(1, keepdim=True),
    "logsumexp": lambda m, z, h, x: z.logsumexp(1, keepdim=True),
    "var": lambda m, z, h, x: z.var(1, keepdim=True),
    "std": lambda m, z, h, x: z.std(1, keepdim=True),
    "normalize": lambda m, z, h, x: F.normalize(z, dim=1),
    "cosine": lambda m, z, h, x: F.cosine_similarity(h, z, dim=1).unsqueeze(1),
    "nansum": lambda m, z, h, x: z.nansum(1, keepdim=True),
    "layer_norm": lambda m, z, h, x: F.layer_norm(z, (8,)),
    "rms_norm": lambda m, z, h, x: F.rms_norm(z, (8,)),
    "group_norm": lambda m, z, h, x: F.group_norm(z, 2),
    "einsum": lambda m, z, h, x: torch.einsum("bi,ijk,bk->bj", h, m.V, x),
    "outer": lambda m, z, h, x: (h.unsqueeze(2) * h.unsqueeze(1) @ x.unsqueeze(2)).squeeze(2),
    "kron": lambda m, z, h, x: h @ torch.kron(m.W[:2, :2], m.W[:4, :4]),
    "tril": lambda m, z, h, x: h @ m.W.tril(),
    "householder": lambda m, z, h, x: orthogonal_to(m, h),
    "cross": lambda m, z, h, x: torch.cat([torch.cross(z[:, :3], h[:, :3], dim=1), h[:, 3:]], 1),
    "addcmul": lambda m, z, h, x: torch.addcmul(x, h, z),
    "lerp": lambda m, z, h, x: torch.lerp(h, x, torch.sigmoid(z)),
    "roll": lambda m, z, h, x: z.roll(1, 1),
    "unfold": lambda m, z, h, x: F.pad(z, (1, 1)).unfold(1, 3, 1).mean(2),
    "conv1d": lambda m, z, h, x: F.conv1d(h.view(-1, 2, 4), m.kernel, padding=1).flatten(1),
    "attention": lambda m, z, h, x: F.scaled_dot_product_attention(
        z.view(-1, 1, 4, 2), h.view(-1, 1, 4, 2), x.view(-1, 1, 4, 2)
    ).flatten(1),
    "embedding": lambda m, z, h, x: F.embedding(x.argmax(1), m.W),
    "experts": lambda m, z, h, x: (m.V[x.argmax(1)] @ h.unsqueeze(2)).squeeze(2),
}
FROM_GRAPH = {
    "bilinear": lambda m, z, h, x: F.bilinear(h, x, m.V),
    "long cumsum": lambda m, z, h, x: 0.01 * z.repeat(1, 40).cumsum(1)[:, -8:],
    "uneven adaptive pool": lambda m, z, h, x: F.adaptive_avg_pool1d(z.unsqueeze(1), 3).sum(2),
    "transposed convolution": lambda m, z, h, x: F.conv_transpose1d(h.view(-1, 2, 4), m.kernel).flatten(1)[:, :8],
    "cdist": lambda m, z, h, x: torch.cdist(h.unsqueeze(1), m.W.unsqueeze(0)).squeeze(1),
    "fft": lambda m, z, h, x: torch.fft.irfft(torch.fft.rfft(h, dim=1) * torch.fft.rfft(m.W[0]), n=8, dim=1),
    "inverse": lambda m, z, h, x: h @ torch.linalg.inv(m.W + 5 * torch.eye(8, **F64)),
    "matrix exponential": lambda m, z, h, x: h @ torch.matrix_exp(m.W - m.W.T),
    "qr": lambda m, z, h, x: h @ torch.linalg.qr(m.W)[0],
}


def gradients(model, xs, h, end):
    """Of a sum of losses, one at every step."""
    h, losses = end(h), []
    for x in xs:
        output = h = model(x, h)
        h = end(h)
        losses.append(output.square().sum())
        if isinstance(end, Carry):
            losses[-1].backward()
    if not isinstance(end, Carry):
        sum(losses).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", [*TAPED, *FROM_GRAPH])
@pytest.mark.filterwarnings("ignore:.*used in a way whose immediate Jacobian")
def test_operations_are_exact(name):
    torch.manual_seed(1)
    model = Step({**TAPED, **FROM_GRAPH}[name])
    xs, h = torch.randn(7, 2, 8, **F64), torch.randn(2, 8, **F64)
    expected = gradients(model, xs, h, lambda state: state)
    carry = Carry(model)
    found = gradients(model, xs, h, carry)
    assert found.keys() >= expected.keys()
    for parameter, wanted in expected.items():
        assert float((found[parameter] - wanted).norm() / wanted.norm()) <= EXACT, parameter
    assert isinstance(carry._past._influence.window[-1], TapedSteps) == (name in TAPED)
