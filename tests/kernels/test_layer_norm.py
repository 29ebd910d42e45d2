from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")

from lswag_fast.errors import InputError
from lswag_fast.kernels import layer_norm as kernel
from lswag_fast.ops.layer_norm import _fused, add_layer_norm, layer_norm

pytestmark = pytest.mark.usefixtures("triton_backend")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of the largest entry: results are rounded once; the sum with the residual once before, in both alike."""


def make_inputs(shape, dtype, device, seed=0):
    """x, residual, weight, bias and the gradients of the sum and of what is normalised."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape, shape, shape[-1:], shape[-1:], shape, shape]
    x, *others = (torch.randn(s, generator=generator) for s in shapes)
    return [t.to(device, dtype) for t in (3 * x + 10, *others)]


def assert_close(got, expected):
    for name, a, b in zip(("total", "normalised", "x", "residual", "weight", "bias"), got, expected, strict=True):
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        assert error <= TOLERANCE[a.dtype], f"{name}: {error:.2e}"


def added(inputs):
    """Both results of add_layer_norm, and the gradients of its four tensors."""
    x, residual, weight, bias = (t.detach().requires_grad_() for t in inputs[:4])
    results = add_layer_norm(x, residual, weight, bias, eps=1e-5)
    return [*results, *torch.autograd.grad(results, (x, residual, weight, bias), inputs[4:])]


def added_in_float64(inputs):
    x, residual, weight, bias = (t.detach().double().requires_grad_() for t in inputs[:4])
    total = x + residual
    total = total + ((inputs[0] + inputs[1]).double() - total).detach()  # rounded as it is stored
    normalised = F.layer_norm(total, total.shape[-1:], weight, bias)
    grads = torch.autograd.grad((total, normalised), (x, residual, weight, bias), [t.double() for t in inputs[4:]])
    return [total, normalised, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 192), (3, 17, 24), (7, 1), (1, 1000), (33, 333), (2, 197, 36), (64, 1, 21)])
def test_of_a_sum(shape, dtype, device, poisoned):
    inputs = make_inputs(shape, dtype, device)
    if shape[-1] == 1:
        # One number is its own mean: what is left is rounding, and 1/sqrt(eps) times that.
        inputs[5].zero_()
    with poisoned():
        got = added(inputs)
    expected = added_in_float64(inputs)
    if shape[-1] == 1:
        assert torch.equal(got[1], inputs[3].expand_as(got[1]))
        got[4], expected[4] = got[1], expected[1]
        got[5], expected[5] = got[1], expected[1]
    assert_close(got, expected)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_weight", [True, False])
def test_alone(with_weight, with_bias, device, poisoned):
    x, _, weight, bias, _, grad = make_inputs((4, 9, 40), torch.float32, device)
    given = [x, weight if with_weight else None, bias if with_bias else None]

    def run(function, tensors):
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        wanted = [t for t in leaves if t is not None]
        return [out, *torch.autograd.grad(out, wanted, grad.to(out.dtype))]

    with poisoned():
        got = run(layer_norm, given)
    expected = run(lambda x, w, b: F.layer_norm(x, (40,), w, b), [None if t is None else t.double() for t in given])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_many_rows_add_up_their_parameters_gradients_by_program(device, monkeypatch):
    monkeypatch.setattr(kernel, "PARTS", 3)
    inputs = make_inputs((77, 200), torch.float32, device)
    assert_close(added(inputs), added_in_float64(inputs))


@pytest.mark.parametrize("wanted", [0b0001, 0b0010, 0b0100, 0b1000])
def test_gradients_asked_for(wanted, device):
    inputs = make_inputs((3, 20), torch.float32, device)
    everything = added(inputs)[2:]
    leaves = [t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs[:4])]
    results = add_layer_norm(*leaves)
    torch.autograd.backward(results, inputs[4:])
    for leaf, expected in zip(leaves, everything, strict=True):
        assert torch.equal(leaf.grad, expected) if leaf.requires_grad else leaf.grad is None


def test_rows_have_the_same_bits_in_any_batch(device):
    inputs = make_inputs((64, 3, 20), torch.bfloat16, device)
    whole = added(inputs)[:4]
    part = added([t[5:7] if t.dim() == 3 else t for t in inputs])[:4]
    assert all(torch.equal(a[5:7], b) for a, b in zip(whole, part, strict=True))


def test_only_one_result_used(device):
    inputs = make_inputs((3, 20), torch.float32, device)
    for used in (0, 1):
        x = inputs[0].clone().requires_grad_()
        add_layer_norm(x, *inputs[1:4])[used].sum().backward()
        exact = inputs[0].double().requires_grad_()
        total = exact + inputs[1].double()
        (total, F.layer_norm(total, (20,), inputs[2].double(), inputs[3].double()))[used].sum().backward()
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_strided_and_empty_rows(device):
    inputs = make_inputs((4, 6, 20), torch.float32, device)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t for t in inputs]
    assert all(torch.equal(a, b) for a, b in zip(added(strided), added(inputs), strict=True))
    assert layer_norm(inputs[0][:0]).shape == (0, 6, 20)
    grads = added([t[:0] if t.dim() == 3 else t for t in inputs])[4:]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_what_is_fused(device, monkeypatch):
    x = torch.zeros(2, 8, device=device)
    assert _fused(x)
    assert not _fused(x.double())
    assert not _fused(x.new_empty(1, 8193))
    assert not _fused(x.to("meta"))
    monkeypatch.setenv("LSWAG_BACKEND", "torch")
    assert not _fused(x)
    results = add_layer_norm(x + 1, x)
    assert torch.equal(results[0], x + 1)
    assert torch.equal(results[1], x)


BAD = [
    ({"x": torch.zeros(2, 8).long()}, r"floating dtype with C >= 1, got torch\.int64"),
    ({"residual": torch.zeros(8)}, r"expected residual \[2, 8\] for x \[2, 8\], got \[8\]"),
    ({"weight": torch.zeros(7)}, r"expected weight \[8\] for x \[2, 8\], got \[7\]"),
    ({"bias": torch.zeros(8).half()}, r"expected bias in the dtype of x \(torch\.float32\), got torch\.float16"),
    ({"weight": torch.zeros(8, device="meta")}, r"expected weight on the device of x \(cpu\), got meta"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_told(change, message):
    given = {"x": torch.zeros(2, 8), "residual": torch.zeros(2, 8), **change}
    with pytest.raises(InputError, match=message):
        add_layer_norm(**given)
