from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lswag_fast.ops.relative_attention import multiply_adds, relative_attention, relative_attention_torch

GRIDS = [(1, 1), (2, 2), (3, 5), (5, 3), (1, 9), (16, 17)]


def definition(qkv, key_tables, value_tables, *, heads, grid, scale):
    """The published formulation, T x T x D tables gathered by index, one pair of tokens at a time."""
    samples, tokens, width = qkv.shape
    head_dim = width // (3 * heads)
    columns = grid[1]

    def gathered(tables: tuple[Tensor, Tensor]) -> Tensor:
        vertical, horizontal = (torch.zeros(tokens, tokens, dtype=torch.int64) for _ in range(2))
        for i in range(1, tokens):
            for j in range(1, tokens):
                reach = tables[0].shape[0] // 2 - 1
                down = (j - 1) // columns - (i - 1) // columns
                right = (j - 1) % columns - (i - 1) % columns
                vertical[i, j] = reach + 1 + min(max(down, -reach), reach)
                horizontal[i, j] = reach + 1 + min(max(right, -reach), reach)
        return tables[0][vertical] + tables[1][horizontal]

    q, k, v = qkv.reshape(samples, tokens, 3, heads, head_dim).unbind(2)
    scores = torch.einsum("sihd,sjhd->shij", q, k) + torch.einsum("sihd,ijd->shij", q, gathered(key_tables))
    p = (scores * scale).softmax(-1)
    out = torch.einsum("shij,sjhd->sihd", p, v) + torch.einsum("shij,ijd->sihd", p, gathered(value_tables))
    return out.reshape(samples, tokens, heads * head_dim)


def make_inputs(samples, heads, head_dim, grid, reach, seed=0, dtype=torch.float64):
    """qkv and the four tables, of unit variance, with gradients required."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 1 + grid[0] * grid[1]
    qkv = torch.randn(samples, tokens, 3 * heads * head_dim, generator=generator, dtype=torch.float64)
    tables = [torch.randn(2 * reach + 2, head_dim, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [t.to(dtype).requires_grad_() for t in (qkv, *tables)]


def run(attention, inputs, grad_seed=1, **options):
    """The output of `attention`, and its gradients in qkv and the four tables."""
    qkv, kv, kh, vv, vh = inputs
    out = attention(qkv, (kv, kh), (vv, vh), **options)
    generator = torch.Generator().manual_seed(grad_seed)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("reach", [2, 14])
def test_twin_is_the_definition(grid, reach):
    inputs = make_inputs(1, 2, 4, grid, reach)
    options = {"heads": 2, "grid": grid, "scale": 0.7}
    for got, expected in zip(
        run(relative_attention_torch, inputs, **options), run(definition, inputs, **options), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_twin_gradients_by_finite_differences():
    inputs = make_inputs(2, 2, 3, (2, 3), 1)
    torch.autograd.gradcheck(
        lambda qkv, kv, kh, vv, vh: relative_attention_torch(qkv, (kv, kh), (vv, vh), heads=2, grid=(2, 3)), inputs
    )


def test_meta_gives_shapes_and_a_graph():
    qkv, *tables = (
        t.detach().to("meta").requires_grad_() for t in make_inputs(2, 3, 8, (3, 4), 2, dtype=torch.float32)
    )
    out = relative_attention(qkv, tuple(tables[:2]), tuple(tables[2:]), heads=3, grid=(3, 4))
    assert out.is_meta
    assert out.shape == (2, 13, 24)
    gradients = torch.autograd.grad(out.sum(), [qkv, *tables])
    assert [g.shape for g in gradients] == [qkv.shape, *(t.shape for t in tables)]


def test_a_torch_function_mode_sees_one_call():
    seen = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append((func, kwargs))
            return func(*args, **(kwargs or {}))

    qkv, kv, kh, vv, vh = make_inputs(1, 1, 4, (2, 2), 1)
    with Record():
        relative_attention(qkv, (kv, kh), (vv, vh), heads=1, grid=(2, 2))
    assert [f for f, _ in seen if f is relative_attention] == [relative_attention]
    assert seen[0][1] == {"heads": 1, "grid": (2, 2), "scale": None}


def test_multiply_adds():
    assert multiply_adds(2, 197, 3, 64, 30) == 2 * (2 * 197 * 197 * 192 + 4 * 30 * 197 * 192)
