from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")

from lswag_fast.capture import intercept
from lswag_fast.errors import InputError
from lswag_fast.kernels import gelu as kernel
from lswag_fast.ops.gelu import activation_backward

pytestmark = pytest.mark.usefixtures("triton_backend")

FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def expected(grad, saved, kind):
    x = saved.double().requires_grad_()
    return torch.autograd.grad(FUNCTIONS[kind](x), x, grad.double())[0]


def test_every_kind_is_tested():
    assert set(FUNCTIONS) == set(kernel.KINDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_gradient(kind, dtype, device, poisoned):
    generator = torch.Generator().manual_seed(0)
    saved = torch.cat((3 * torch.randn(1100, generator=generator), torch.tensor([0.0, -0.0, 6, 3, -3, 30, -30, 6e4])))
    saved = saved.to(device, dtype)
    grad = torch.randn(saved.shape, generator=generator).to(device, dtype)
    with poisoned():
        got = activation_backward(grad, saved, kind)
    wanted = expected(grad, saved, kind)
    if kind == "hardswish":
        # At -3 and 3 either side's derivative will do.
        corners = saved.abs() == 3
        assert ((got.double() / grad)[corners].abs() <= 1).all()
        got, wanted = got[~corners], wanted[~corners]
    torch.testing.assert_close(got.double(), wanted, rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_what_is_not_finite_stays_so(kind, device):
    saved = torch.tensor([torch.nan, 1.0], device=device)
    grad = torch.tensor([1.0, torch.nan], device=device)
    got = activation_backward(grad, saved, kind)
    assert got[1].isnan()
    assert got[0].isnan() or kind in ("relu", "relu6", "hardswish")


@pytest.mark.parametrize("size", [0, 1, 7, 1024, 1025])
def test_tails(size, device, poisoned):
    saved = torch.linspace(-2, 2, size, device=device)
    with poisoned():
        got = activation_backward(torch.ones_like(saved), saved, "gelu")
    torch.testing.assert_close(got.double(), expected(torch.ones_like(saved), saved, "gelu"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1, 9), (3, 17, 21), (5, 197, 4), (64, 17, 9)])
def test_tokens_of_a_batch(shape, device, poisoned):
    generator = torch.Generator().manual_seed(0)
    saved, grad = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    with poisoned():
        got = activation_backward(grad, saved, "gelu")
    torch.testing.assert_close(got.double(), expected(grad, saved, "gelu"), rtol=1e-6, atol=1e-6)


def test_layouts(device):
    generator = torch.Generator().manual_seed(0)
    saved, grad = (torch.randn(2, 3, 4, 5, generator=generator).to(device) for _ in range(2))
    plain = activation_backward(grad, saved, "silu")
    channels_last = saved.to(memory_format=torch.channels_last)
    sliced = torch.zeros(2, 3, 4, 9, device=device)[..., :5].copy_(saved)
    for other in (channels_last, sliced, saved.transpose(0, 3).contiguous().transpose(0, 3)):
        assert torch.equal(activation_backward(grad, other, "silu"), plain)
    expanded = torch.ones((), device=device).expand(2, 3, 4, 5)
    ones = activation_backward(torch.ones_like(saved), saved, "silu")
    assert torch.equal(activation_backward(expanded, channels_last, "silu"), ones)


def test_capture_takes_the_kernel(device, monkeypatch):
    calls = []
    backward = kernel.backward
    monkeypatch.setattr(kernel, "backward", lambda *given: calls.append(given[2]) or backward(*given))
    x = torch.linspace(-2, 2, 9, device=device, requires_grad=True)
    intercept.activation(x, "gelu_tanh", lambda pre: F.gelu(pre, approximate="tanh")).sum().backward()
    assert calls == ["gelu_tanh"]
    torch.testing.assert_close(
        x.grad.double(), expected(torch.ones_like(x), x.detach(), "gelu_tanh"), rtol=1e-6, atol=1e-6
    )


def test_bad_input_is_told():
    x = torch.zeros(3)
    with pytest.raises(InputError, match="one of relu, relu6, gelu, gelu_tanh, silu, hardswish, got 'elu'"):
        activation_backward(x, x, "elu")
    for other in (torch.zeros(4), x.half(), x.to("meta")):
        with pytest.raises(InputError, match="expected grad and saved of one shape, floating dtype and device"):
            activation_backward(x, other, "gelu")
