from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")

from lswag_fast.kernels import relative_attention as kernel
from lswag_fast.ops.relative_attention import (
    RelativeAttention,
    _native,
    _RelativeAttention,
    _TritonRelativeAttention,
    relative_attention,
    relative_attention_torch,
)

pytestmark = pytest.mark.usefixtures("triton_backend")

NAMES = ("out", "qkv", "key vertical", "key horizontal", "value vertical", "value horizontal")
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Of the largest entry. 16 bits: the rounding of probabilities, score gradients and results, 2^-11 or 2^-9 each."""


def make_inputs(samples, heads, grid, reach, dtype, device, seed=0):
    """qkv, the four tables and the output's gradient, of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 1 + grid[0] * grid[1]
    shapes = [(samples, tokens, 3 * heads * 64), *[(2 * reach + 2, 64)] * 4, (samples, tokens, heads * 64)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def run(attention, inputs, **options):
    """The output, and the gradients of qkv and the four tables."""
    *inputs, grad_out = inputs
    inputs = [t.detach().requires_grad_() for t in inputs]
    qkv, kv, kh, vv, vh = inputs
    out = attention(qkv, (kv, kh), (vv, vh), **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def assert_is_the_definition(inputs, poisoned, **options):
    with poisoned():
        got = run(relative_attention, inputs, **options)
    expected = run(relative_attention_torch, [t.double() for t in inputs], **options)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert a.dtype == inputs[0].dtype
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        assert error <= TOLERANCE[a.dtype], f"{name}: {error:.2e}"


FLOAT32_CASES = [
    (4, 1, (2, 2), 14),
    (2, 4, (4, 4), 2),
    (1, 2, (7, 7), 14),
    (1, 1, (14, 14), 14),
    (2, 1, (3, 5), 1),
    (1, 1, (1, 9), 15),
    (1, 3, (1, 1), 1),
    (1, 1, (2, 20), 14),
    (9, 1, (1, 2), 2),
    (64, 1, (2, 2), 2),
]


@pytest.mark.parametrize(("samples", "heads", "grid", "reach"), FLOAT32_CASES)
def test_float32(samples, heads, grid, reach, device, poisoned):
    inputs = make_inputs(samples, heads, grid, reach, torch.float32, device)
    assert_is_the_definition(inputs, poisoned, heads=heads, grid=grid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("samples", "heads", "grid", "reach"), [(3, 2, (2, 3), 14), (1, 2, (7, 7), 3), (1, 1, (3, 17), 14)]
)
def test_sixteen_bits(samples, heads, grid, reach, dtype, device, poisoned):
    inputs = make_inputs(samples, heads, grid, reach, dtype, device)
    assert_is_the_definition(inputs, poisoned, heads=heads, grid=grid)


def test_the_size_of_autoformer_in_bfloat16(device, poisoned):
    inputs = make_inputs(1, 1, (14, 14), 14, torch.bfloat16, device)
    assert_is_the_definition(inputs, poisoned, heads=1, grid=(14, 14))


def test_what_the_tables_add_to_scores_is_not_rounded_to_bfloat16(device):
    *tensors, _ = make_inputs(2, 1, (4, 4), 3, torch.bfloat16, device)
    qkv, kv, kh, vv, vh = tensors
    got = relative_attention(qkv, (8 * kv, 8 * kh), (vv, vh), heads=1, grid=(4, 4))
    exact = [t.double() for t in (qkv, 8 * kv, 8 * kh, vv, vh)]
    expected = relative_attention_torch(exact[0], tuple(exact[1:3]), tuple(exact[3:]), heads=1, grid=(4, 4))
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=2**-7)


def test_rows_of_qkv_are_read_where_they_are(device):
    inputs = make_inputs(3, 2, (2, 3), 2, torch.float32, device)
    wide = torch.full((4, 9, 3 * 2 * 64 + 16), torch.nan, device=device)
    wide[:3, :7, : 3 * 2 * 64] = inputs[0]
    view = wide[:3, :7, : 3 * 2 * 64]
    assert kernel.rows_apart(view) is view
    apart = run(relative_attention, [view, *inputs[1:]], heads=2, grid=(2, 3), scale=0.2)
    transposed = inputs[0].mT.contiguous().mT
    copied = run(relative_attention, [transposed, *inputs[1:]], heads=2, grid=(2, 3), scale=0.2)
    for a, b, c in zip(apart, copied, run(relative_attention, inputs, heads=2, grid=(2, 3), scale=0.2), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


@pytest.mark.parametrize("wanted", [0b00000, 0b00001, 0b00010, 0b10100, 0b11110])
def test_gradients_asked_for(wanted, device):
    inputs = make_inputs(2, 2, (2, 3), 2, torch.float32, device)
    everything = run(relative_attention, inputs, heads=2, grid=(2, 3))[1:]
    leaves = [t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs[:5])]
    out = relative_attention(leaves[0], tuple(leaves[1:3]), tuple(leaves[3:]), heads=2, grid=(2, 3))
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.backward(inputs[5])
    for leaf, expected in zip(leaves, everything, strict=True):
        assert torch.equal(leaf.grad, expected) if leaf.requires_grad else leaf.grad is None


def test_an_expanded_gradient(device):
    inputs = make_inputs(2, 1, (2, 2), 2, torch.float32, device)
    inputs[5] = torch.ones((), device=device).expand(2, 5, 64)
    dense = [*inputs[:5], torch.ones(2, 5, 64, device=device)]
    for a, b in zip(*(run(relative_attention, given, heads=1, grid=(2, 2)) for given in (inputs, dense)), strict=True):
        assert torch.equal(a, b)


def test_the_same_bits_again_and_in_any_batch(device):
    inputs = make_inputs(3, 1, (4, 4), 3, torch.bfloat16, device)
    first, second = (run(relative_attention, inputs, heads=1, grid=(4, 4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = run(relative_attention, [inputs[0][2:3], *inputs[1:5], inputs[5][2:3]], heads=1, grid=(4, 4))
    assert all(torch.equal(a[2:3], b) for a, b in zip(first[:2], alone[:2], strict=True))


def test_nan_stays_in_its_sample(device):
    inputs = make_inputs(3, 2, (3, 4), 2, torch.bfloat16, device)
    inputs[0][1, 5] = torch.nan
    out, grad_qkv, *_ = run(relative_attention, inputs, heads=2, grid=(3, 4))
    for result in (out, grad_qkv):
        assert result[1].isnan().any()
        assert result[[0, 2]].isfinite().all()
    assert out[1].isnan().all()


def test_large_scores_are_finite(device):
    inputs = make_inputs(2, 1, (3, 3), 2, torch.float32, device)
    inputs[0] *= 1e8
    assert all(t.isfinite().all() for t in run(relative_attention, inputs, heads=1, grid=(3, 3), scale=1.0)[:1])


def test_no_samples(device):
    inputs = make_inputs(0, 2, (2, 2), 1, torch.float32, device)
    out, grad_qkv, *grad_tables = run(relative_attention, inputs, heads=2, grid=(2, 2))
    assert out.shape == (0, 5, 128)
    assert grad_qkv.shape == (0, 5, 384)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grad_tables)


def test_what_takes_the_kernels(device, monkeypatch):
    qkv, *tables, _ = make_inputs(1, 2, (2, 2), 3, torch.float32, device)
    assert _native(qkv, tables, 2, (2, 2)) is _TritonRelativeAttention
    assert _native(qkv.double(), tables, 2, (2, 2)) is None
    assert _native(qkv, tables, 3, (2, 2)) is None  # D = 128 / 3
    assert _native(qkv.new_empty(1, 65, 384), tables, 2, (2, 32)) is None
    assert _native(qkv, [t.new_empty(34, 64) for t in tables], 2, (2, 2)) is None
    assert _native(qkv, [*tables[:3], tables[3][:4]], 2, (2, 2)) is None
    assert _native(qkv.to("meta"), tables, 2, (2, 2)) is _RelativeAttention
    monkeypatch.setenv("LSWAG_BACKEND", "torch")
    assert _native(qkv, tables, 2, (2, 2)) is None


def test_per_sample_gradients_by_vmap(device):
    qkv, kv, kh, vv, vh, _ = make_inputs(2, 1, (2, 3), 2, torch.float32, device)

    def loss(one, table):
        return relative_attention(one[None], (table, kh), (vv, vh), heads=1, grid=(2, 3)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=1), (0, None))(qkv, kv)
    for sample in range(2):
        table = kv.clone().requires_grad_()
        (alone,) = torch.autograd.grad(loss(qkv[sample], table), table)
        torch.testing.assert_close(got[sample], alone, rtol=1e-4, atol=1e-4)


def test_the_package_does_not_import_triton():
    code = "import sys, lswag_fast.capture; sys.exit('lswag_fast.kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_indicator_is_kept_once_written_and_not_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from lswag_fast.kernels import relative_places

    waits = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(1))
    capturing = [True]
    monkeypatch.setattr(relative_places, "_KEPT", {})
    monkeypatch.setattr(relative_places, "_indicator", lambda *given: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    shape = ((2, 2), 4, torch.float32, torch.device("cuda", 0))
    of_graph = relative_places.indicator(*shape)
    assert of_graph is not relative_places.indicator(*shape)
    assert not waits
    capturing[0] = False
    kept = relative_places.indicator(*shape)
    capturing[0] = True
    assert relative_places.indicator(*shape) is kept
    assert waits == [1]


def test_without_a_graph_the_numbers_are_the_same(device):
    *inputs, grad_out = make_inputs(2, 2, (2, 3), 2, torch.float32, device)
    qkv, *tables = inputs
    expected = run(relative_attention, [*inputs, grad_out], heads=2, grid=(2, 3))
    got = RelativeAttention.of(qkv, tuple(tables[:2]), tuple(tables[2:]), heads=2, grid=(2, 3))
    assert torch.equal(got.output, expected[0])
    assert torch.equal(got.backward(grad_out), expected[1])
