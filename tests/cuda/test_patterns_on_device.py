"""Activation patterns on a CUDA device against the CPU's; every buffer lies between guards and holds rubbish first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lswag_fast import _C, InputError
from lswag_fast.ops import activation_patterns as ap

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)
if not _C.cuda_kernels():
    pytest.skip("this build holds no CUDA kernels", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SAMPLES = [2, 17, 32, 64, 65, 128, 1024]
LAYOUTS = ["contiguous", "sample second", "channels last", "every other", "slice", "odd start", "expanded"]
SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 6e-8, float("nan"), -float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 65504.0]
GUARD = 64
POISON = 0x5A


@pytest.fixture(autouse=True)
def fresh_numbers(request: pytest.FixtureRequest) -> None:
    """Other numbers at every run; the seed stands in the report of a failure."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    request.node.add_report_section("setup", "seed", f"torch.manual_seed({seed})")


class GuardedTorch:
    """torch, but that what it allocates on a CUDA device holds rubbish and lies between guards."""

    def __init__(self) -> None:
        self.guards: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        if torch.device(device).type != "cuda":
            return torch.empty(*shape, dtype=dtype)
        size = torch.Size(shape).numel() * dtype.itemsize
        memory = torch.full((GUARD + size + GUARD,), POISON, dtype=torch.uint8, device=device)
        self.guards += [memory[:GUARD], memory[GUARD + size :]]
        return memory[GUARD : GUARD + size].view(dtype).view(shape)

    def empty_like(self, tensor: Tensor) -> Tensor:
        if tensor.is_cuda and tensor.is_contiguous():
            return self.empty(*tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return torch.full_like(tensor, 77.0)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the ops allocate through `GuardedTorch`, and looks at the guards at the end."""
    allocator = GuardedTorch()
    monkeypatch.setattr(ap, "torch", allocator)
    yield
    torch.cuda.synchronize()
    assert all((guard == POISON).all() for guard in allocator.guards)


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
    if layout == "odd start":
        return torch.cat([values.new_full((1,), 7.0), values.flatten()])[1:].view(values.shape)
    if layout == "expanded":
        return values[:, :, :1].expand_as(values)
    return values


def check_against_cpu(pre: Tensor, kind: str, samples: int) -> None:
    post, words = ap.activate_and_pack(on_device(pre), kind, samples=samples)
    expected, _ = ap.activate_and_pack(pre, kind)
    tolerance = {torch.float32: 8e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}[pre.dtype]
    torch.testing.assert_close(post.cpu(), expected, rtol=tolerance, atol=1e-6, equal_nan=True)
    assert torch.equal(words.cpu(), ap.pack_signs(post.cpu(), samples=samples))


def on_device(tensor: Tensor) -> Tensor:
    """A copy with the same strides and the same place relative to 16 bytes."""
    if tensor.numel() == 0:
        return tensor.cuda()
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.storage_offset() % 16
    memory = torch.zeros(offset + size, dtype=tensor.dtype)
    memory[offset:] = tensor.as_strided((size,), (1,))
    return memory.cuda().as_strided(tensor.shape, tensor.stride(), offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_signs(guarded: None, dtype: torch.dtype, samples: int, layout: str) -> None:
    for shape in ((samples, 5, 333), (samples, 7, 64), (samples, 3, 756), (samples, 1, 1), (samples, 0, 4)):
        values = laid_out(torch.randn(shape).to(dtype), layout)
        assert torch.equal(ap.pack_signs(on_device(values)).cpu(), ap.pack_signs(values))
        packed = int(torch.randint(samples + 1, ()))
        assert torch.equal(
            ap.pack_signs(on_device(values), samples=packed).cpu(), ap.pack_signs(values, samples=packed)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ap.ACTIVATIONS)
@pytest.mark.parametrize("samples", [2, 32, 64, 100])
def test_activations(guarded: None, dtype: torch.dtype, kind: str, samples: int) -> None:
    for layout in LAYOUTS:
        check_against_cpu(laid_out((torch.randn(samples, 9, 252) * 4).to(dtype), layout), kind, samples)
        check_against_cpu(laid_out((torch.randn(samples, 5, 64) * 4).to(dtype), layout), kind, samples // 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ap.ACTIVATIONS)
def test_special_values(guarded: None, dtype: torch.dtype, kind: str) -> None:
    pre = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (33, 8, 40))].to(dtype)
    check_against_cpu(pre, kind, 33)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ap.ACTIVATIONS)
def test_every_value_of_16_bits(dtype: torch.dtype, kind: str) -> None:
    pre = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).cuda()
    post = ap.activate_and_pack(pre[None], kind)[0][0]
    in_float32 = ap.activate_and_pack(pre.float()[None], kind)[0][0].to(dtype)
    assert torch.equal(post.isnan(), in_float32.isnan())
    assert torch.equal(post.nan_to_num(), in_float32.nan_to_num())


def test_gelu_is_as_close_as_on_the_cpu() -> None:
    pre = torch.cat([torch.linspace(-20, 20, 400_001), torch.logspace(-30, 1, 10_000), -torch.logspace(-30, 1, 10_000)])
    exact = torch.nn.functional.gelu(pre.double())
    post = ap.activate_and_pack(pre.cuda()[None], "gelu")[0][0].cpu()
    near = pre.abs() <= 6
    assert (post - exact).abs()[near].max() <= 5e-7


@pytest.mark.parametrize("samples", [4, 48, 64, 96, 130])
def test_groups_of_samples_add_up_to_the_batch(guarded: None, samples: int) -> None:
    whole = torch.randn(samples, 7, 90).cuda()
    cuts = sorted({0, samples, *torch.randint(samples + 1, (4,)).tolist()})
    words = None
    for first, last in itertools.pairwise(cuts):
        part = laid_out(whole[first:last].clone(), LAYOUTS[int(torch.randint(3, ()))])
        words = ap.pack_signs(part, words=words, first_sample=first)
    assert words is not None
    assert torch.equal(words, ap.pack_signs(whole))


def random_words(samples: int, positions: int, kind: str) -> Tensor:
    width = ap.words_per_pattern(samples)
    words = torch.randint(-(2**63), 2**63 - 1, (width, positions))
    if kind == "equal" and positions:
        words[:] = words[:, :1].clone()
    elif kind == "few" and positions:
        words = words[:, torch.randint(min(5, positions), (positions,))]
    elif kind == "half equal" and positions:
        words[:, ::2] = words[:, :1].clone()
    return words


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("kind", ["random", "equal", "few", "half equal"])
def test_counts(guarded: None, samples: int, kind: str) -> None:
    sizes = [0, 1, 1023, 0, 1025, *torch.randint(70_000, (3,)).tolist(), 0]
    words = [random_words(samples, n, kind) for n in sizes]
    words.append(words[5].flip(1))
    expected = ap.count_patterns(words, samples)
    given = [w.cuda() for w in words]
    assert ap.count_patterns(given, samples) == expected
    counts = ap.count_patterns_device(given, samples)
    assert counts.is_cuda
    assert counts.dtype == torch.int64
    assert counts.tolist() == [expected.union, *expected.per_layer]
    assert ap.count_distinct(given, samples) == expected.union


def test_counts_of_many_activations(guarded: None) -> None:
    words = [random_words(40, n, "random") for n in torch.randint(500, (150,)).tolist()]
    words += [w.clone() for w in words[:20]]
    assert ap.count_patterns([w.cuda() for w in words], 40) == ap.count_patterns(words, 40)


def test_counts_of_a_network_of_usual_size(guarded: None) -> None:
    words = [random_words(64, 197 * 864, "random") for _ in range(14)]
    words[7][:, :50_000] = words[3][:, :50_000]
    assert ap.count_patterns([w.cuda() for w in words], 64) == ap.count_patterns(words, 64)


@pytest.mark.parametrize("samples", [64, 128])
def test_patterns_made_to_collide_are_counted(guarded: None, samples: int) -> None:
    # All hashes agree in their upper 32 bits: one partition, one slot, and only the patterns' own bits split them.
    inverse = [pow(factor, -1, 2**64) for factor in (0xD6E8FEB86659FD93, 0x9E3779B97F4A7C15)]
    numbers = []
    for low in range(3000):
        product = (0xABCDEF01 << 32 | low) * inverse[0] % 2**64
        numbers.append((product ^ product >> 32) * inverse[1] % 2**64)
    row = torch.tensor([n - 2**64 if n >= 2**63 else n for n in numbers])
    words = torch.stack([torch.zeros_like(row)] * (samples // 64 - 1) + [row])
    counts = ap.count_patterns([words.cuda(), words[:, :7].cuda()], samples)
    assert (counts.union, counts.per_layer) == (3000, (3000, 7))


@pytest.mark.parametrize("samples", SAMPLES)
def test_hamming_kernel(guarded: None, samples: int) -> None:
    sizes = [0, 1, 64, 1025, int(torch.randint(20_000, ()))]
    words = [random_words(samples, n, "random") for n in sizes]
    found = ap.hamming_kernel([w.cuda() for w in words], samples)
    assert found.is_cuda
    assert torch.equal(found.cpu(), ap.hamming_kernel(words, samples))


def test_network_of_activations() -> None:
    activations = [torch.randn(21, 60, 40), torch.randn(21, 999)]
    assert ap.activation_patterns([a.cuda() for a in activations], pattern_samples=18) == ap.activation_patterns(
        activations, pattern_samples=18
    )


def candidate(pre: list[Tensor]) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """A candidate's work: two activations, their counts and their kernel."""

    def work() -> tuple[Tensor, Tensor, Tensor]:
        words = [ap.activate_and_pack(x, kind)[1] for x, kind in zip(pre, ("gelu", "relu"), strict=True)]
        post, _ = ap.activate_and_pack(pre[0], "silu")
        return post, ap.count_patterns_device(words, 40), ap.hamming_kernel(words, 40)

    return work


def test_a_captured_graph_follows_its_inputs() -> None:
    pre = [torch.randn(40, 70, 96, device="cuda"), torch.randn(40, 5000, device="cuda", dtype=torch.bfloat16)]
    work = candidate(pre)
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for _ in range(3):
        for x in pre:
            x.copy_(torch.randn(x.shape))
        pre[1][:, ::2] = pre[1][:, :1].clone()
        graph.replay()
        found = [t.clone() for t in captured]
        for x, y in zip(found, work(), strict=True):
            assert torch.equal(x, y)


def test_work_is_put_on_the_current_stream() -> None:
    pre = [torch.zeros(40, 70, 96, device="cuda"), torch.zeros(40, 5000, device="cuda", dtype=torch.bfloat16)]
    values = [torch.randn(x.shape, device="cuda").to(x.dtype) for x in pre]
    expected = candidate(values)()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, value in zip(pre, values, strict=True):
            x.copy_(value)
        found = candidate(pre)()
    torch.cuda.current_stream().wait_stream(stream)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_nothing_waits_for_the_device() -> None:
    work = candidate([torch.randn(40, 70, 96, device="cuda"), torch.randn(40, 5000, device="cuda")])
    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.current_stream()
        torch.cuda._sleep(500_000_000)
        work()
        waiting = not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waiting


def test_results_are_the_same_at_every_run() -> None:
    words = [random_words(64, 200_000, "half equal").cuda() for _ in range(3)]
    first = ap.count_patterns_device(words, 64), ap.hamming_kernel(words, 64)
    for _ in range(5):
        again = ap.count_patterns_device(words, 64), ap.hamming_kernel(words, 64)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_more_than_2_31_elements(most_of_a_device: Callable[[int], None]) -> None:
    most_of_a_device(29)
    pre = torch.full((2, 2**30 + 1024), -1.0, dtype=torch.bfloat16, device="cuda")
    pre[1, -5:] = 1.0
    post, words = ap.activate_and_pack(pre, "relu")
    assert words.shape == (1, 2**30 + 1024)
    assert words[0, -6:].tolist() == [0, 2, 2, 2, 2, 2]
    assert int(post[:, :-5].max()) == 0
    assert int((words != 0).sum()) == 5


def test_tensors_on_several_devices_are_refused() -> None:
    words = [random_words(64, 10, "random").cuda(), random_words(64, 10, "random")]
    with pytest.raises(InputError, match="one device, got cuda:0 and cpu"):
        ap.count_patterns(words, 64)
    with pytest.raises(InputError, match="activation's device cuda:0, got cpu"):
        ap.pack_signs(torch.zeros(4, 10, device="cuda"), words=words[1], first_sample=0)
    with pytest.raises(ValueError, match="DLPack device type 1"):
        _C.cuda_pack_signs(torch.zeros(4, 10, device="cuda"), None, words[1], 0, 0, 4, False, 0)


def test_kernels_check_the_memory_they_are_given() -> None:
    words = [random_words(64, 10, "random").cuda()]
    small = torch.zeros(8, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="workspace must hold"):
        _C.cuda_count_patterns(words, 64, small, small, 0)
    with pytest.raises(ValueError, match="counts must hold 2 numbers"):
        _C.cuda_count_patterns(words, 64, small[:1], small, 0)
    with pytest.raises(ValueError, match="out must hold 4096 numbers"):
        _C.cuda_count_agreements(words, 64, small, small, 0)
