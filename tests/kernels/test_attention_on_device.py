"""Attention, LayerNorm and the gradients of activations on a CUDA device, at the sizes of AutoFormer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from lswag_fast.ops.gelu import activation_backward
from lswag_fast.ops.layer_norm import add_layer_norm, layer_norm
from lswag_fast.ops.relative_attention import _native, _TritonRelativeAttention, relative_attention
from lswag_fast.ops.relative_attention import relative_attention_torch as in_torch

NAMES = ("out", "qkv", "key vertical", "key horizontal", "value vertical", "value horizontal")
ATTENTION = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of the largest entry."""


@pytest.fixture
def seed(record_property) -> int:
    """A fresh one each time, printed where a test fails."""
    fresh = torch.seed() % 2**31
    print("seed", fresh)
    record_property("seed", fresh)
    torch.manual_seed(fresh)
    return fresh


def attention_inputs(samples, heads, grid, dtype, reach=14):
    tokens = 1 + grid[0] * grid[1]
    shapes = [(samples, tokens, 3 * heads * 64), *[(2 * reach + 2, 64)] * 4, (samples, tokens, heads * 64)]
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def run(attention, inputs, **options):
    leaves = [t.detach().requires_grad_() for t in inputs[:5]]
    out = attention(leaves[0], tuple(leaves[1:3]), tuple(leaves[3:]), **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[5])]


def assert_close(got, expected, tolerance, names=NAMES):
    for name, a, b in zip(names, got, expected, strict=True):
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        assert error <= tolerance, f"{name}: {error:.2e} of the largest entry is above {tolerance:.0e}"


@pytest.mark.parametrize("dtype", ATTENTION)
@pytest.mark.parametrize("heads", range(3, 11))
def test_attention_of_every_head_count(heads, dtype, seed, poisoned):
    inputs = attention_inputs(8, heads, (14, 14), dtype)
    with poisoned():
        got = run(relative_attention, inputs, heads=heads, grid=(14, 14))
    expected = run(in_torch, [t.double() for t in inputs], heads=heads, grid=(14, 14))
    # A table's gradient adds up the roundings of 8 samples and every head, which do not cancel in its largest entry.
    assert_close(got, expected, 2 * ATTENTION[dtype])


@pytest.mark.parametrize("dtype", ATTENTION)
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (7, 7), (16, 16), (24, 24), (31, 31), (1, 30)])
def test_attention_on_other_grids(grid, dtype, seed, poisoned):
    inputs = attention_inputs(2, 3, grid, dtype)
    assert _native(inputs[0], inputs[1:5], 3, grid) is _TritonRelativeAttention
    with poisoned():
        got = run(relative_attention, inputs, heads=3, grid=grid)
    assert_close(got, run(in_torch, [t.double() for t in inputs], heads=3, grid=grid), 2 * ATTENTION[dtype])


@pytest.mark.parametrize("dtype", ATTENTION)
def test_attention_has_the_same_bits_again_in_any_batch_and_on_any_stream(dtype, seed):
    inputs = attention_inputs(64, 4, (14, 14), dtype)
    first = run(relative_attention, inputs, heads=4, grid=(14, 14))
    for _ in range(3):
        again = run(relative_attention, inputs, heads=4, grid=(14, 14))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = run(relative_attention, inputs, heads=4, grid=(14, 14))
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(first, aside, strict=True))
    alone = run(relative_attention, [inputs[0][9:10], *inputs[1:5], inputs[5][9:10]], heads=4, grid=(14, 14))
    assert all(torch.equal(a[9:10], b) for a, b in zip(first[:2], alone[:2], strict=True))


def test_attention_is_ieee_float32_whatever_torch_allows(seed):
    inputs = attention_inputs(2, 3, (14, 14), torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        got = run(relative_attention, inputs, heads=3, grid=(14, 14))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert_close(got, run(in_torch, [t.double() for t in inputs], heads=3, grid=(14, 14)), 2 * ATTENTION[torch.float32])


def test_attention_past_two_to_the_31_elements(seed, most_of_a_device):
    most_of_a_device(15)
    heads, tokens = 10, 197
    samples = 2**31 // (tokens * 3 * heads * 64) + 2
    inputs = attention_inputs(samples, heads, (14, 14), torch.bfloat16)
    leaves = [inputs[0].requires_grad_(), *inputs[1:5]]
    out = relative_attention(leaves[0], tuple(leaves[1:3]), tuple(leaves[3:]), heads=heads, grid=(14, 14))
    (grad,) = torch.autograd.grad(out, leaves[0], inputs[5])
    last = [inputs[0][-1:].detach().requires_grad_(), *inputs[1:5]]
    expected = relative_attention(last[0], tuple(last[1:3]), tuple(last[3:]), heads=heads, grid=(14, 14))
    assert torch.equal(out[-1:], expected)
    assert torch.equal(grad[-1:], torch.autograd.grad(expected, last[0], inputs[5][-1:])[0])


def test_rows_past_two_to_the_31_elements(most_of_a_device):
    most_of_a_device(29)
    saved = torch.ones(2**22 + 1, 512, device="cuda", dtype=torch.bfloat16)
    saved[-1, -5:] = -1
    grad = activation_backward(saved.abs(), saved, "relu")
    assert grad[-1, -6:].tolist() == [1, 0, 0, 0, 0, 0]
    assert int((grad != 1).sum()) == 5
    saved[-1] = torch.randn(512, device="cuda")
    assert torch.equal(layer_norm(saved)[-1], layer_norm(saved[-1:])[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_attention_on_a_device_that_is_not_the_current_one(seed):
    inputs = attention_inputs(2, 3, (7, 7), torch.bfloat16)
    here = run(relative_attention, inputs, heads=3, grid=(7, 7))
    there = run(relative_attention, [t.to("cuda:1") for t in inputs], heads=3, grid=(7, 7))
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("columns", [192, 216, 240, 448, 528, 624, 1001])
def test_layer_norm_of_a_sum(columns, dtype, seed, poisoned):
    shapes = [(64, 197, columns)] * 2 + [(columns,)] * 2 + [(64, 197, columns)] * 2
    x, residual, weight, bias, *grads = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]

    def both():
        with poisoned():
            results = add_layer_norm(*leaves)
            return [*results, *torch.autograd.grad(results, leaves, grads)]

    got, again = both(), both()
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    total = got[0].detach().double().requires_grad_()
    w, b = (t.detach().double().requires_grad_() for t in (weight, bias))
    normalised = F.layer_norm(total, (columns,), w, b)
    of_total, of_weight, of_bias = torch.autograd.grad((total, normalised), (total, w, b), [g.double() for g in grads])
    assert torch.equal(got[0], x + residual)
    expected = [total, normalised, of_total, of_total, of_weight, of_bias]
    names = ("total", "normalised", "x", "residual", "weight", "bias")
    assert_close(got, expected, ROUNDING[dtype] if dtype != torch.float32 else 1e-5, names)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", ["relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish"])
def test_activation_backward(kind, dtype, seed, poisoned):
    saved, grad = (torch.randn(64, 197, 961, device="cuda").to(dtype) for _ in range(2))
    with poisoned():
        got = activation_backward(3 * grad, saved, kind)
    functions = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    x = saved.double().requires_grad_()
    (expected,) = torch.autograd.grad(
        functions.get(kind, getattr(F, kind.removesuffix("_tanh")))(x), x, (3 * grad).double()
    )
    assert_close([got], [expected], ROUNDING[dtype], (kind,))
