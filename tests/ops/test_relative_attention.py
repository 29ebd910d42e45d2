from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lswag_fast import _C, backends
from lswag_fast.errors import InputError
from lswag_fast.ops.relative_attention import (
    RelativeAttention,
    multiply_adds,
    relative_attention,
    relative_attention_torch,
)


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


@pytest.mark.parametrize(
    ("grid", "reach"), [((1, 1), 1), ((2, 2), 3), ((3, 5), 2), ((5, 3), 14), ((1, 9), 2), ((16, 17), 14)]
)
def test_twin_is_the_definition(grid, reach):
    inputs = make_inputs(1, 2, 4, grid, reach)
    options = {"heads": 2, "grid": grid, "scale": 0.7}
    for got, expected in zip(
        run(relative_attention_torch, inputs, **options), run(definition, inputs, **options), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_twin_gradients_by_finite_differences():
    inputs = make_inputs(1, 2, 2, (2, 3), 1)
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


def assert_native_is_the_definition(inputs, *, heads, grid, scale=None):
    """Holds the native output and gradients to the float64 twin on the same numbers.

    A float32 result sums up to D + T products, each rounded to 2^-24, of scores whose own error the exponential passes
    on in proportion to their size; errors are against the largest entry, or 1, the size of what is summed, where all
    entries are smaller. In bfloat16, keys of the class, probabilities and score gradients are rounded to 2^-9 before
    products, and every result once more; 2^-11 in float16's results. The gradient of a table adds up such results of
    S * H samples and heads, whose roundings grow as the root of their number.
    """
    exact = [t.detach().double().requires_grad_() for t in inputs]
    options = {"heads": heads, "grid": grid, "scale": scale}
    expected = run(relative_attention_torch, exact, **options)
    samples, tokens, width = inputs[0].shape
    head_dim = width // (3 * heads)
    q, k, _ = exact[0].detach().reshape(samples, tokens, 3, heads, head_dim).unbind(2)
    largest = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item() * (scale or head_dim**-0.5)
    tolerance = 4 * 2**-24 * (head_dim + tokens) * max(1.0, largest)
    rounding = {torch.float32: 0, torch.float16: 2**-10, torch.bfloat16: 2**-6}[inputs[0].dtype]
    names = ("out", "qkv", "key vertical", "key horizontal", "value vertical", "value horizontal")
    for name, got, wanted in zip(names, run(relative_attention, inputs, **options), expected, strict=True):
        assert got.dtype == inputs[0].dtype
        error = (got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1)
        added_up = samples * heads if " " in name else 1
        allowed = tolerance + rounding * added_up**0.5
        assert error <= allowed, f"{name}: {error:.2e} is above {allowed:.2e}"


@settings(max_examples=16)
@given(
    samples=st.integers(1, 3),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 72),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.sampled_from([(16, 17), (1, 33)]),
    reach=st.integers(1, 15),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_native_is_the_twin(samples, heads, head_dim, grid, reach, dtype, seed):
    inputs = make_inputs(samples, heads, head_dim, grid, reach, seed, dtype)
    assert_native_is_the_definition(inputs, heads=heads, grid=grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_at_the_size_of_autoformer(dtype):
    inputs = make_inputs(2, 3, 64, (14, 14), 14, dtype=dtype)
    assert_native_is_the_definition(inputs, heads=3, grid=(14, 14))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_in_several_blocks_of_queries(dtype):
    inputs = make_inputs(1, 1, 16, (20, 21), 14, dtype=dtype)
    assert_native_is_the_definition(inputs, heads=1, grid=(20, 21))


def test_native_with_more_heads_than_partial_sums():
    inputs = make_inputs(90, 3, 4, (1, 2), 1, dtype=torch.float32)
    assert_native_is_the_definition(inputs, heads=3, grid=(1, 2))


def test_native_neither_overflows_nor_loses_large_scores():
    inputs = make_inputs(1, 2, 16, (5, 5), 3, dtype=torch.float32)
    with torch.no_grad():
        inputs[0].mul_(30)
    assert_native_is_the_definition(inputs, heads=2, grid=(5, 5), scale=1.0)
    with torch.no_grad():
        inputs[0].mul_(1e8)
    qkv, kv, kh, vv, vh = inputs
    assert relative_attention(qkv, (kv, kh), (vv, vh), heads=2, grid=(5, 5), scale=1.0).isfinite().all()


def test_native_on_identical_tokens():
    inputs = make_inputs(1, 2, 16, (5, 5), 3, dtype=torch.float32)
    with torch.no_grad():
        inputs[0][:] = inputs[0][0, 0]
    assert_native_is_the_definition(inputs, heads=2, grid=(5, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_keeps_nan_in_its_sample(dtype):
    inputs = make_inputs(3, 2, 16, (3, 4), 2, dtype=dtype)
    with torch.no_grad():
        inputs[0][1, 5] = torch.nan
    out, grad_qkv, *_ = run(relative_attention, inputs, heads=2, grid=(3, 4))
    for result in (out, grad_qkv):
        assert result[1].isnan().any()
        assert result[[0, 2]].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("bits", [0x7FC00001, 0xFFFFFFFF, 0x7F800001])
@pytest.mark.parametrize("third", [0, 1, 2])
def test_native_keeps_nan_of_any_payload(third, bits):
    inputs = make_inputs(2, 1, 16, (3, 4), 2, dtype=torch.float32)
    nan = torch.tensor([bits - 2**32 if bits >= 2**31 else bits], dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        inputs[0][1, 5, 16 * third : 16 * third + 16] = nan
    qkv, kv, kh, vv, vh = inputs
    out = relative_attention(qkv, (kv, kh), (vv, vh), heads=1, grid=(3, 4))
    expected = relative_attention_torch(qkv, (kv, kh), (vv, vh), heads=1, grid=(3, 4))
    assert torch.equal(out.isnan(), expected.isnan())


def test_native_reads_lazily_negated_tensors():
    inputs = make_inputs(2, 2, 8, (3, 4), 2, dtype=torch.float32)
    negated = [torch._neg_view(-t.detach()).requires_grad_() for t in inputs]
    options = {"heads": 2, "grid": (3, 4)}
    for got, expected in zip(
        run(relative_attention, negated, **options), run(relative_attention, inputs, **options), strict=True
    ):
        assert torch.equal(got, expected)
    qkv, kv, kh, vv, vh = inputs
    grad = torch.randn(2, 13, 16)
    gradients = [
        torch.autograd.grad(relative_attention(qkv, (kv, kh), (vv, vh), **options), inputs, g)
        for g in (-grad, torch._neg_view(grad))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_native_refuses_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        qkv, kv, kh, vv, vh = (torch.empty(s) for s in ((2, 13, 48), *[(6, 8)] * 4))
    with pytest.raises(InputError):
        relative_attention(qkv, (kv, kh), (vv, vh), heads=2, grid=(3, 4))


def test_kernels_check_the_memory_they_are_given():
    qkv, tables, layout = torch.zeros(2, 9, 48), [torch.zeros(6, 8)] * 4, (2, 2, 4)
    out, softmax = torch.zeros(2, 9, 16), torch.zeros(2, 2, 9, 2)
    space = torch.empty(_C.relative_attention_backward_bytes(qkv, tables, layout, 1, True), dtype=torch.uint8)
    grads = [torch.zeros(6, 8) for _ in range(4)]
    good = [qkv, tables, layout, 1.0, 1, out, softmax, space]
    _C.relative_attention_forward(*good)
    for place, bad in ((0, qkv.double()), (1, [torch.zeros(6, 7)] * 4), (2, (2, 2, 5)), (4, 0), (5, out[:1])):
        with pytest.raises(ValueError, match=r"expected|must"):
            _C.relative_attention_forward(*good[:place], bad, *good[place + 1 :])
    for place, bad in ((6, softmax.double()), (7, space[:64])):
        with pytest.raises(ValueError, match=r"expected|must"):
            _C.relative_attention_forward(*good[:place], bad, *good[place + 1 :])
    good = [qkv, tables, layout, 1.0, 1, softmax, out, torch.zeros_like(qkv), grads, space]
    _C.relative_attention_backward(*good)
    for place, bad in ((5, softmax[:1]), (6, out.half()), (7, out), (8, grads[:3]), (8, [out] * 4), (9, space[:64])):
        with pytest.raises(ValueError, match=r"expected|must"):
            _C.relative_attention_backward(*good[:place], bad, *good[place + 1 :])


def test_native_reads_strided_tensors():
    inputs = make_inputs(4, 2, 8, (3, 4), 2, dtype=torch.float32)
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in inputs]
    options = {"heads": 2, "grid": (3, 4)}
    for got, expected in zip(
        run(relative_attention, strided, **options), run(relative_attention, inputs, **options), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("wanted", [0b00000, 0b00001, 0b00010, 0b10100, 0b11110])
def test_native_gives_the_gradients_asked_for(wanted):
    inputs = make_inputs(2, 2, 8, (3, 4), 2, dtype=torch.float32)
    everything = run(relative_attention, inputs, heads=2, grid=(3, 4))[1:]
    for place, tensor in enumerate(inputs):
        tensor.requires_grad_(bool(wanted >> place & 1))
    qkv, kv, kh, vv, vh = inputs
    out = relative_attention(qkv, (kv, kh), (vv, vh), heads=2, grid=(3, 4))
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float())
    for place, (tensor, expected) in enumerate(zip(inputs, everything, strict=True)):
        assert tensor.grad is None if not wanted >> place & 1 else torch.equal(tensor.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_gives_the_same_bits_with_any_number_of_threads(dtype):
    inputs = make_inputs(5, 3, 16, (6, 5), 4, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run(relative_attention, inputs, heads=3, grid=(6, 5)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_samples_give_no_outputs():
    qkv, kv, kh, vv, vh = make_inputs(0, 2, 8, (2, 2), 1, dtype=torch.float32)
    out = relative_attention(qkv, (kv, kh), (vv, vh), heads=2, grid=(2, 2))
    out.sum().backward()
    assert out.shape == (0, 5, 16)
    assert torch.equal(kv.grad, torch.zeros_like(kv))


def test_per_sample_gradients_by_vmap():
    qkv, kv, kh, vv, vh = (t.detach() for t in make_inputs(3, 2, 8, (2, 3), 2, dtype=torch.float32))

    def loss(one, table):
        return relative_attention(one[None], (table, kh), (vv, vh), heads=2, grid=(2, 3)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=1), (0, None))(qkv, kv)
    for sample in range(3):
        torch.testing.assert_close(got[sample], torch.func.grad(loss, argnums=1)(qkv[sample], kv))


@pytest.mark.parametrize("path", [p for p in _C.cpu_paths() if p != _C.cpu_path()])
@pytest.mark.skipif("LSWAG_CPU" in os.environ, reason="the instruction set is already chosen")
def test_every_instruction_set_of_this_machine(path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native", __file__],
        env={**os.environ, "LSWAG_CPU": path, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


BAD = [
    ({"qkv": (2, 8, 48)}, r"T = 1 \+ 2\*4 = 9 tokens, got T = 8"),
    ({"qkv": (9, 48)}, r"expected qkv \[S, T, 3\*H\*D\].* got shape \[9, 48\]"),
    ({"qkv": (2, 9, 47)}, r"divides by 3\*H = 6, got 47"),
    ({"heads": 0}, "heads >= 1"),
    ({"grid": (9, 0)}, "grid of"),
    ({"scale": 0.0}, "scale must be above 0"),
    ({"scale": float("inf")}, "scale must be above 0"),
    ({"key_tables": ((6, 8), (5, 8))}, r"horizontal table of key_tables as floating \[2\*L\+2, D\] with D = 8"),
    ({"value_tables": ((6, 4), (6, 8))}, r"vertical table of value_tables .* with D = 8, got torch.float32 \[6, 4\]"),
    ({"key_tables": ((6, 8),)}, "got 1 tables"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
@pytest.mark.parametrize("attention", [relative_attention, relative_attention_torch])
def test_bad_input_is_told_before_any_work(attention, change, message):
    shapes = {"qkv": (2, 9, 48), "key_tables": ((6, 8), (6, 8)), "value_tables": ((6, 8), (6, 8))}
    options = {"heads": 2, "grid": (2, 4), "scale": None}
    shapes |= {name: value for name, value in change.items() if name in shapes}
    options |= {name: value for name, value in change.items() if name in options}
    qkv = torch.zeros(shapes["qkv"])
    tables = [tuple(torch.zeros(shape) for shape in shapes[name]) for name in ("key_tables", "value_tables")]
    with pytest.raises(InputError, match=message):
        attention(qkv, *tables, **options)


def test_dtypes_and_devices_that_do_not_fit_are_told():
    table = torch.zeros(6, 8)
    with pytest.raises(InputError, match=r"floating dtype, got torch\.int64"):
        relative_attention(torch.zeros(2, 9, 48).long(), (table, table), (table, table), heads=2, grid=(2, 4))
    elsewhere = table.to("meta")
    with pytest.raises(InputError, match=r"key_tables on the device of qkv \(cpu\), got meta"):
        relative_attention(torch.zeros(2, 9, 48), (elsewhere, table), (table, table), heads=2, grid=(2, 4))


@pytest.mark.parametrize("way", ["cpp", "torch"])
def test_without_a_graph_the_numbers_are_the_same(way):
    inputs = make_inputs(2, 3, 8, (3, 4), 2, dtype=torch.float32)
    grad_out = torch.randn(2, 13, 24, generator=torch.Generator().manual_seed(2))
    qkv, *tables = (t.detach() for t in inputs)
    leaf = inputs[0]
    with backends.preferring(way):
        expected = relative_attention(leaf, tuple(tables[:2]), tuple(tables[2:]), heads=3, grid=(3, 4))
        with torch.no_grad():
            got = RelativeAttention.of(qkv, tuple(tables[:2]), tuple(tables[2:]), heads=3, grid=(3, 4))
            gradient = got.backward(grad_out)
    assert not got.output.requires_grad
    assert torch.equal(got.output, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, leaf, grad_out)[0])


def test_without_a_graph_the_shapes_are_checked():
    qkv, *tables = make_inputs(2, 3, 8, (3, 4), 2, dtype=torch.float32)
    with pytest.raises(InputError, match="13 tokens"):
        RelativeAttention.of(qkv[:, 1:], tuple(tables[:2]), tuple(tables[2:]), heads=3, grid=(3, 4))
