from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lswag_fast import _C, InputError, reference
from lswag_fast.ops import activation_patterns as ap

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 6e-8, float("nan"), -float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 65504.0]
FUNCTIONS = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}
LAYOUTS = ["contiguous", "sample second", "channels last", "every other", "slice", "expanded"]


def examples(count: int) -> settings:
    return settings(max_examples=min(count, settings.default.max_examples))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values [S, A, B] with other strides."""
    if layout == "sample second":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels last":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other":
        return torch.stack([values, -values], dim=-1)[..., 0]
    if layout == "slice":
        return torch.cat([values, -values], dim=-1)[..., : values.shape[-1]]
    if layout == "expanded":
        return values[:, :, :1].expand_as(values)
    return values


@st.composite
def activations(draw: st.DrawFn, samples: int | None = None) -> Tensor:
    samples = samples or draw(st.sampled_from([2, 3, 15, 16, 17, 20, 21, 31, 32, 33, 63, 64, 65, 130]))
    shape = (samples, draw(st.integers(0, 9)), draw(st.sampled_from([1, 2, 15, 64, 65, 700])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["random", "special", "positive", "few patterns", "rare"]))
    if kind == "special":
        values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    elif kind == "positive":
        values = values.abs() + 1
    elif kind == "few patterns":
        values = values[:, :, :1].expand(shape).contiguous()
    elif kind == "rare":
        values = values - 3
    return laid_out(values.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS)))


def words_of(patterns: np.ndarray) -> Tensor:
    """The words [W, P] of given patterns, uint64 [P, W] or [P]."""
    return torch.from_numpy(patterns.reshape(len(patterns), -1).T.copy().view(np.int64))


def distinct(patterns: np.ndarray) -> int:
    return len(np.unique(patterns.reshape(len(patterns), -1), axis=0))


@given(st.data())
@examples(60)
def test_packed_bits_are_the_signs(data: st.DataObject):
    activation = data.draw(activations())
    packed = data.draw(st.integers(0, len(activation)))
    words = ap.pack_signs(activation, samples=packed)
    expected = (activation[:packed] > 0).reshape(packed, activation[0].numel())
    assert words.shape == (ap.words_per_pattern(packed), activation[0].numel())
    for n in range(packed):
        assert torch.equal((words[n // 64] >> (n % 64) & 1).bool(), expected[n])
    if packed % 64:
        assert not (words[-1] & torch.tensor(-1, dtype=torch.int64) << packed % 64).any()


@given(st.data())
@examples(40)
def test_counts_are_those_of_the_definition(data: st.DataObject):
    first = data.draw(activations())
    rest = data.draw(st.lists(activations(len(first)), max_size=3))
    counts = ap.activation_patterns([first, *rest])
    assert (counts.union, counts.per_layer) == reference.activation_patterns([first, *rest])
    assert counts.positions == tuple(a[0].numel() for a in [first, *rest])
    words = [ap.pack_signs(a) for a in [first, *rest]]
    assert torch.equal(ap.hamming_kernel(words, len(first)), reference.hamming_kernel([first, *rest]))
    assert ap.count_distinct(words, len(first)) == counts.union


@given(st.data())
@examples(30)
def test_groups_of_samples_add_up_to_the_batch(data: st.DataObject):
    whole = data.draw(activations(data.draw(st.sampled_from([4, 48, 64, 96, 130]))))
    cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=4))})
    words = None
    for first, last in itertools.pairwise(cuts):
        part = laid_out(whole[first:last].clone(), data.draw(st.sampled_from(LAYOUTS[:3])))
        words = ap.pack_signs(part, words=words, first_sample=first)
    assert torch.equal(words, ap.pack_signs(whole))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("first", [1, 32, 64, 128])
def test_the_first_group_may_be_any_of_the_batch(size: int, first: int):
    """Memory that words are made in holds something: 100 kB of ones, freed just before, stand for that."""
    activation = torch.randn(size, 300)
    expected = ap.pack_signs(activation, words=torch.zeros(0, 300, dtype=torch.int64), first_sample=first)
    rows = ap.words_per_pattern(first + size)
    for samples in (size, size // 2, 0):
        dirt = [torch.full((rows, 300), -1) for _ in range(8)]
        del dirt
        words = ap.pack_signs(activation, first_sample=first, samples=samples)
        alone = torch.zeros(ap.words_per_pattern(first + samples), 300, dtype=torch.int64)
        assert torch.equal(words, ap.pack_signs(activation, words=alone, first_sample=first, samples=samples))
    assert torch.equal(ap.pack_signs(activation, first_sample=first), expected)


def test_subnormal_values_are_positive_where_the_processor_flushes_them():
    activation = torch.tensor([[1e-40], [-1e-40], [1.0], [float("nan")]]).repeat(1, 100)
    torch.set_flush_denormal(True)
    try:
        words = ap.pack_signs(activation)
    finally:
        torch.set_flush_denormal(False)
    assert torch.all(words == 0b0101)


def test_tables_of_many_threads_stay_within_bounds(monkeypatch: pytest.MonkeyPatch):
    """Where all patterns are equal, one partition has them all, and every thread would get a table for it."""
    sizes = []
    allocate = ap._workspace
    monkeypatch.setattr(ap, "_workspace", lambda numel: sizes.append(numel) or allocate(numel))
    monkeypatch.setattr(ap, "_TABLE_BYTES", 2**22)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    words = torch.cat([torch.full((1, 40_000), 5), torch.arange(9000)[None]], dim=1)
    assert ap.count_distinct([words], 64) == 9000
    assert max(sizes) <= 2**22


def test_largest_batch():
    activation = torch.randn(1024, 3, 50)
    activation[:, 1] = activation[:, 0]
    activation[1023, 1, 7] *= -1
    counts = ap.activation_patterns([activation])
    assert counts.union == counts.per_layer[0] == 101
    words = [ap.pack_signs(activation)]
    assert torch.equal(ap.hamming_kernel(words, 1024), reference.hamming_kernel([activation]))


def test_first_samples_only():
    activation = torch.randn(80, 500)
    counts = ap.activation_patterns([activation], pattern_samples=20)
    assert counts.union == reference.activation_patterns([activation[:20]])[0]
    assert ap.count_distinct([ap.pack_signs(activation)], 20) == counts.union


@pytest.mark.parametrize("samples", [20, 21, 26, 27, 64, 100])
@pytest.mark.parametrize("kind", ["equal", "two", "consecutive", "low bit of each byte", "half equal", "high bits"])
def test_many_patterns_of_hostile_kinds(samples: int, kind: str):
    positions = 60_000
    number = np.arange(positions, dtype=np.uint64)
    patterns = {
        "equal": np.full(positions, 5, np.uint64),
        "two": number % 2,
        "consecutive": number,
        "low bit of each byte": sum((number >> np.uint64(i) & np.uint64(1)) << np.uint64(8 * i) for i in range(8)),
        "half equal": np.where(number % 2 == 0, number, 3),
        "high bits": number << np.uint64(min(samples, 64) - 16),
    }[kind]
    patterns &= np.uint64(2 ** min(samples, 64) - 1)
    if samples > 64:
        patterns = np.stack([patterns, number % np.uint64(3)], axis=1)
    layers = [patterns, patterns[::-1].copy(), patterns[: positions // 7]]
    counts = ap.count_patterns([words_of(p) for p in layers], samples)
    assert counts.union == distinct(patterns)
    assert counts.per_layer == tuple(distinct(p) for p in layers)


def unmix(hashes: np.ndarray) -> np.ndarray:
    """The words whose mix with 0 gives these hashes: the kernel's mixing undone."""
    word = hashes ^ hashes >> np.uint64(32)
    return word * np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))


PARTITION_FACTOR, SLOT_FACTOR = 0xD6E8FEB86659FD93, 0xA0761D6478BD642F


@pytest.mark.parametrize("samples", [64, 128])
@pytest.mark.parametrize("factor", [PARTITION_FACTOR, SLOT_FACTOR])
def test_patterns_made_to_collide_are_counted(samples: int, factor: int):
    # The product of hash and factor is then a small number, whose top bits, which are the partition or slot, are 0.
    number = np.arange(40_000, dtype=np.uint64)
    product = np.concatenate([number, number[:10_000]])
    patterns = unmix(product * np.uint64(pow(factor, -1, 2**64)))
    if samples > 64:
        patterns = np.stack([np.zeros_like(patterns), patterns], axis=1)
    counts = ap.count_patterns([words_of(patterns), words_of(patterns[:7])], samples)
    assert counts.union == 40_000
    assert counts.per_layer == (40_000, 7)


def test_bits_beyond_the_samples_do_not_count():
    words = torch.tensor([[0b0101, 0b1101, 0b0001]])
    assert ap.count_patterns([words], 3) == ap.PatternCounts(2, (2,), (3,))
    assert ap.count_distinct([words], 30) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ap.ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_is_torchs(dtype: torch.dtype, kind: str, layout: str):
    pre = laid_out(torch.randn(21, 5, 333) * 4, layout).to(dtype)
    before = pre.clone()
    post, words = ap.activate_and_pack(pre, kind, samples=19)
    assert post.dtype == dtype
    assert torch.equal(pre, before)
    exact = FUNCTIONS[kind](pre.double())
    torch.testing.assert_close(post.double(), exact, rtol=4e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)
    assert torch.equal(words, ap.pack_signs(post, samples=19))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ap.ACTIVATIONS)
def test_special_values(dtype: torch.dtype, kind: str):
    pre = torch.tensor([SPECIAL, SPECIAL[::-1]]).to(dtype)
    post, words = ap.activate_and_pack(pre, kind)
    assert post[pre.isnan()].isnan().all()
    assert post[pre == 0].eq(0).all()
    assert post[pre.isposinf()].gt(0).all()
    assert torch.equal(words, ap.pack_signs(post))
    if kind in ("relu", "relu6"):
        assert torch.equal(post.nan_to_num(), FUNCTIONS[kind](pre).nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ap.ACTIVATIONS)
def test_every_value_of_16_bits(dtype: torch.dtype, kind: str):
    pre = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    post = ap.activate_and_pack(pre[None], kind)[0][0]
    in_float32 = ap.activate_and_pack(pre.float()[None], kind)[0][0].to(dtype)
    assert torch.equal(post.isnan(), in_float32.isnan())
    assert torch.equal(post.nan_to_num(), in_float32.nan_to_num())
    assert post[pre.isnan()].isnan().all()


def test_gelu_is_closer_than_float32_torch():
    pre = torch.cat([torch.linspace(-20, 20, 400_001), torch.logspace(-30, 1, 10_000), -torch.logspace(-30, 1, 10_000)])
    exact = F.gelu(pre.double())
    ours = (ap.activate_and_pack(pre[None], "gelu")[0][0] - exact).abs()
    torchs = (F.gelu(pre) - exact).abs()
    near = pre.abs() <= 6
    assert ours[near].max() <= min(2.4e-7 * 1.01, torchs[near].max())
    assert ours.max() <= torchs.max()
    tail = near & (pre < 0)
    assert (ours[tail] / exact[tail].abs()).max() < 1e-5


@pytest.mark.parametrize("path", [p for p in _C.cpu_paths() if p != _C.cpu_path()])
def test_every_instruction_set(path: str):
    if "LSWAG_CPU" in os.environ:
        pytest.skip("this is such a run")
    environment = os.environ | {"LSWAG_CPU": path, "LSWAG_TEST_PROFILE": "sanitize"}
    kernels = "packed or subnormal or definition or hostile or collide or torchs or special or every_value or closer"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", kernels, str(Path(__file__))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]


def test_results_do_not_depend_on_the_number_of_threads():
    activation = torch.randn(40, 30_000)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        post, words = ap.activate_and_pack(activation, "silu")
        results.append((post, words, ap.hamming_kernel([words], 40), ap.count_patterns([words], 40)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0][:3], other[:3], strict=True))
        assert other[3] == results[0][3]


def test_numpy_arrays_are_read():
    array = np.random.default_rng(0).standard_normal((9, 40), dtype=np.float32)
    expected = ap.activation_patterns([torch.from_numpy(array)])
    assert ap.activation_patterns([array]) == expected
    assert ap.activation_patterns([np.ascontiguousarray(array[:, ::-1])[:, ::-1]]) == expected
    array.flags.writeable = False
    assert ap.activation_patterns([array]) == expected


def test_lazily_negated_tensors_are_read():
    activation = torch.randn(9, 40)
    assert torch.equal(ap.pack_signs(torch._neg_view(activation)), ap.pack_signs(-activation))


def test_counts_as_a_tensor_are_those_of_the_counts():
    words = [ap.pack_signs(torch.randn(20, 90)) for _ in range(3)]
    counts = ap.count_patterns(words, 20)
    assert ap.count_patterns_device(words, 20).tolist() == [counts.union, *counts.per_layer]
    with pytest.raises(InputError, match="at least one"):
        ap.count_patterns_device([], 20)


def test_kernels_check_the_memory_they_are_given():
    activation = torch.zeros(70, 10)
    with pytest.raises(ValueError, match="must hold 20 numbers"):
        _C.pack_signs(activation, None, torch.zeros(1, 10, dtype=torch.int64), 0, 0, 70, False, 1)
    words = [torch.zeros(1, 10, dtype=torch.int64)]
    space = torch.zeros(100, dtype=torch.int64)
    with pytest.raises(ValueError, match="too few slots"):
        _C.count_partitions(words, 40, 0, space, torch.tensor([10]), 64, space, space, 1)
