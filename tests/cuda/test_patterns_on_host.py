"""The block algorithms of csrc/cuda, compiled for the CPU with sanitizers and run on threads: no GPU is needed.

What they count is compared with Python's sets, what they pack with torch's functions.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("patterns_on_host.cpp")
FUNCTIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}
SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 6e-8, float("nan"), -float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 65504.0]


def compiled(folder: Path, sanitizer: str) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    program = folder / sanitizer.split(",")[0]
    includes = [f"-I{REPOSITORY / 'csrc' / part}" for part in ("include", "cpu", "cuda")]
    warnings = ["-Wall", "-Wextra", "-Werror", "-DLSWAG_ISA=host"]
    options = ["-std=c++17", "-O1", "-g1", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = [compiler, *options, *warnings, *includes, "-x", "c++", str(SOURCE), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0 and "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert built.returncode == 0, built.stderr
    return program


@pytest.fixture(scope="module")
def memory_checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("host"), "address,undefined")


@pytest.fixture(scope="module")
def race_checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("host"), "thread")


def numbers(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


def run(program: Path, threads: int, cases: list[bytes]) -> bytes:
    given = numbers(len(cases)) + b"".join(cases)
    done = subprocess.run([program, str(threads)], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout


def masked(patterns: np.ndarray, samples: int) -> np.ndarray:
    """Patterns uint64 [P, W], without the bits at S and beyond."""
    patterns = patterns.copy()
    if samples % 64:
        patterns[:, -1] &= np.uint64(2 ** (samples % 64) - 1)
    return patterns


def layers_bytes(layers: list[np.ndarray], samples: int) -> bytes:
    given = numbers(samples, len(layers))
    return given + b"".join(numbers(len(p)) + np.ascontiguousarray(p.T).tobytes() for p in layers)


def set_counts(layers: list[np.ndarray], samples: int) -> list[int]:
    sets = [{row.tobytes() for row in masked(p, samples)} for p in layers]
    return [len(set().union(*sets)), *(len(s) for s in sets)]


@dataclass
class Count:
    """Layers of patterns uint64 [P, W]; counted in 2^bits partitions, in small hash sets where asked."""

    layers: list[np.ndarray]
    samples: int
    bits: int = 3
    small: bool = True

    def given(self) -> bytes:
        return numbers(0, self.bits, self.small) + layers_bytes(self.layers, self.samples)


def random_patterns(generator: np.random.Generator, positions: int, samples: int, kind: str) -> np.ndarray:
    width = -(-samples // 64)
    patterns = generator.integers(0, 2**64, (positions, width), np.uint64)
    if kind == "equal":
        patterns[:] = patterns[:1]
    elif kind == "few":
        patterns = patterns[generator.integers(0, min(5, max(positions, 1)), positions)]
    elif kind == "one bit apart":
        patterns[:] = 0
        for p in range(positions):
            patterns[p, p % samples // 64] |= np.uint64(1) << np.uint64(p % samples % 64)
    elif kind == "half equal":
        patterns[::2] = patterns[:1]
    return patterns


def unmixed(hashes: np.ndarray) -> np.ndarray:
    """The single words with these 64-bit hashes, before their last factor: the kernel's mixing undone."""
    product = hashes * np.uint64(pow(0xD6E8FEB86659FD93, -1, 2**64))
    return (product ^ product >> np.uint64(32)) * np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))


def colliding(positions: int, kept_bits: int, width: int) -> np.ndarray:
    """Distinct patterns whose hashes agree in all but their lowest `kept_bits` bits."""
    hashes = np.arange(positions, dtype=np.uint64) << np.uint64(kept_bits) >> np.uint64(kept_bits)
    hashes |= np.uint64(0xABCDEF01 << 32) & np.uint64(2**64 - 2**32)
    last = unmixed(hashes)
    return np.stack([np.zeros_like(last)] * (width - 1) + [last], axis=1)


def count_cases(seed: int, large: bool) -> list[Count]:
    generator = np.random.default_rng(seed)
    cases = []
    for samples in (1, 2, 17, 32, 63, 64, 65, 128, 1000, 1024):
        for kind in ("random", "equal", "few", "one bit apart", "half equal"):
            sizes = generator.integers(0, 2500 if large else 700, generator.integers(1, 5))
            layers = [random_patterns(generator, int(n), samples, kind) for n in sizes]
            cases.append(Count(layers, samples, bits=int(generator.integers(0, 8)), small=bool(generator.integers(2))))
            # The same patterns in several activations.
            cases[-1].layers.append(layers[0][::-1].copy())
    # Empty activations before, between and after others; none with a position; sizes about that of a tile.
    sizes = [0, 1023, 0, 0, 1024, 1025, 1, 0]
    cases.append(Count([random_patterns(generator, n, 65, "random") for n in sizes], 65))
    cases.append(Count([random_patterns(generator, 0, 64, "random")] * 3, 64))
    # More activations than are counted at a time, with sets that overflow and with sets that do not.
    many = [random_patterns(generator, int(n), 20, "random") for n in generator.integers(0, 60, 75)]
    cases += [Count(many, 20, bits=0), Count(many, 20, bits=0, small=False), Count([*many, *many[::-1]], 20, bits=2)]
    # All in one partition and one slot: with hashes that agree in 32 bits, only the patterns' own bits split them.
    for width in (1, 2):
        same = colliding(600 if large else 300, 0, width)
        assert len({row.tobytes() for row in same}) == len(same)
        cases += [Count([same, same[:7]], 64 * width), Count([same], 64 * width, small=False)]
    return cases


def check_counts(program: Path, threads: int, cases: list[Count]) -> None:
    found = np.frombuffer(run(program, threads, [case.given() for case in cases]), np.int64).tolist()
    for case in cases:
        expected = set_counts(case.layers, case.samples)
        here, found = found[: len(expected)], found[len(expected) :]
        sizes = [len(p) for p in case.layers]
        assert here == expected, f"S = {case.samples}, positions {sizes}, bits {case.bits}, small {case.small}"
    assert not found


def test_counts_are_those_of_sets(memory_checked: Path) -> None:
    check_counts(memory_checked, 1, count_cases(0, large=True))


def test_threads_that_share_a_block_count_alike(race_checked: Path) -> None:
    check_counts(race_checked, 3, count_cases(1, large=False))


def test_partitions_of_a_usual_size(memory_checked: Path) -> None:
    generator = np.random.default_rng(5)
    layers = [random_patterns(generator, n, 64, "random") for n in (9000, 7000)]
    check_counts(memory_checked, 1, [Count(layers, 64, bits=4, small=False)])
    # One partition of more distinct patterns than a set holds.
    check_counts(memory_checked, 1, [Count(layers, 64, bits=0, small=False)])


@pytest.mark.parametrize(("sanitizer", "threads"), [("memory_checked", 1), ("race_checked", 3)])
def test_agreements(sanitizer: str, threads: int, request: pytest.FixtureRequest) -> None:
    program = request.getfixturevalue(sanitizer)
    generator = np.random.default_rng(2)
    cases = []
    for samples in (1, 2, 17, 64, 65, 130):
        sizes = [*generator.integers(0, 1500, 3).tolist(), 0, 64, 1025]
        cases.append(([random_patterns(generator, n, samples, "random") for n in sizes], samples))
    given = [numbers(1, 1 + i % 3) + layers_bytes(*case) for i, case in enumerate(cases)]
    found = np.frombuffer(run(program, threads, given), np.int64)
    for layers, samples in cases:
        bits = np.unpackbits(np.concatenate(layers).view(np.uint8), axis=1, bitorder="little")[:, :samples]
        signs = bits.astype(np.int64) * 2 - 1
        expected = (signs.T @ signs + len(bits)) // 2
        assert np.array_equal(found[: samples**2].reshape(samples, samples), expected), samples
        found = found[samples**2 :]
    assert not len(found)


@dataclass
class Packing:
    """An activation over a view of a buffer, written in place or to a view of another buffer."""

    kind: str
    pre: Tensor
    post: Tensor | None
    first_sample: int
    packed: int
    words: Tensor | None

    def words_before(self) -> Tensor:
        if self.words is not None:
            return self.words
        rows = -(-(self.first_sample + self.packed) // 64)
        return torch.full((rows, self.pre[0].numel()), 0x5A5A5A5A5A5A5A5A)

    def given(self) -> bytes:
        kind = list(FUNCTIONS).index(self.kind)
        accumulate = self.words is not None
        header = numbers(2, kind, self.pre.element_size(), self.first_sample, self.packed, accumulate, self.pre.dim())
        header += numbers(*self.pre.shape)
        words = self.words_before()
        target = b"" if self.post is None else whole(self.post)
        output = self.pre if self.post is None else self.post
        return b"".join(
            [
                header,
                numbers(len(whole(self.pre))) + whole(self.pre) + placement(self.pre),
                numbers(self.post is None, len(target)) + target + placement(output),
                numbers(words.numel()) + words.numpy().tobytes(),
            ]
        )


def whole(view: Tensor) -> bytes:
    """The bytes of all the memory that a view is a view of."""
    storage = view.untyped_storage()
    return bytes(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())


def placement(view: Tensor) -> bytes:
    return numbers(view.storage_offset(), *view.stride())


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values [S, A, B] with other strides, in memory that holds other numbers too."""
    if layout == "sample second":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels last":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other":
        return torch.stack([values, -values], dim=-1)[..., 0]
    if layout == "slice":
        return torch.cat([values, -values], dim=-1)[..., : values.shape[-1]]
    if layout == "odd start":
        flat = torch.cat([values.new_full((1,), 7.0), values.flatten(), values.new_full((3,), 7.0)])
        return flat[1:-3].view(values.shape)
    return values.contiguous()


LAYOUTS = ["contiguous", "sample second", "channels last", "every other", "slice", "odd start"]


def packing_cases(seed: int, count: int) -> list[Packing]:
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    cases = []
    for i in range(count):
        samples = int(generator.choice([1, 2, 7, 8, 9, 16, 17, 32, 40, 64, 65, 130]))
        shape = (samples, int(generator.choice([1, 3, 8])), int(generator.choice([1, 5, 12, 16, 64, 100])))
        values = torch.randn(shape) * 4
        if i % 5 == 0:
            values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]
        values = values.to(torch.float32 if generator.integers(2) else torch.bfloat16)
        kind = list(FUNCTIONS)[i % len(FUNCTIONS)]
        pre = laid_out(values, str(generator.choice(LAYOUTS)))
        inplace = kind == "none" or bool(generator.integers(2))
        post = None if inplace else laid_out(torch.full_like(values, 3.0), str(generator.choice(LAYOUTS)))
        first, packed, words = 0, samples, None
        if i % 3 == 0:
            first, packed = int(generator.choice([0, 3, 8, 60, 64, 100])), int(generator.integers(0, samples + 1))
            rows = -(-(first + packed) // 64) + 1
            # The bits that are to come must be 0 before.
            words = torch.zeros(rows, values[0].numel(), dtype=torch.int64)
            for n in range(first):
                words[n // 64] |= torch.randint(2, words.shape[1:]) << n % 64
        cases.append(Packing(kind, pre, post, first, packed, words))
    return cases


def check_packing(program: Path, threads: int, cases: list[Packing]) -> None:
    found = run(program, threads, [case.given() for case in cases])
    runs = set()
    for case in cases:
        target = case.pre if case.post is None else case.post
        size = len(whole(target))
        memory = torch.frombuffer(bytearray(found[:size]), dtype=torch.uint8)
        after = torch.tensor([], dtype=case.pre.dtype).set_(
            memory.untyped_storage(), target.storage_offset(), target.shape, target.stride()
        )
        before = case.words_before()
        words = torch.frombuffer(bytearray(found[size : size + 8 * before.numel()]), dtype=torch.int64).view_as(before)
        found = found[size + 8 * before.numel() :]
        runs.add(int(np.frombuffer(found[:8], np.int64)[0]))
        found = found[8:]
        check_one_packing(case, after, words)
        # Nothing is written but the view.
        untouched = torch.tensor([], dtype=torch.uint8).set_(memory.untyped_storage())
        untouched.view(case.pre.dtype)[: 0 if size == 0 else None].as_strided(
            target.shape, target.stride(), target.storage_offset()
        ).copy_(target)
        assert bytes(untouched.numpy()) == whole(target)
    assert not found
    assert runs == {1, 4, 8}


def check_one_packing(case: Packing, after: Tensor, words: Tensor) -> None:
    what = f"{case.kind} {case.pre.dtype} {list(case.pre.shape)} {case.pre.stride()} first {case.first_sample}"
    if case.kind == "none":
        assert torch.equal(after.nan_to_num(), case.pre.nan_to_num()), what
    else:
        exact = FUNCTIONS[case.kind](case.pre.double())
        exact = torch.where(case.pre.isneginf() & exact.isnan(), after.double(), exact)
        tolerance = 8e-6 if case.pre.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(after.double(), exact, rtol=tolerance, atol=1e-6, equal_nan=True, msg=what)
    expected = case.words_before().clone()
    if case.words is None:
        expected[:] = 0
    positive = (after > 0).reshape(len(after), -1)
    for n in range(case.packed):
        bit = case.first_sample + n
        expected[bit // 64] |= positive[n].long() << bit % 64
    assert torch.equal(words, expected), what


def test_packing_and_activations(memory_checked: Path) -> None:
    check_packing(memory_checked, 1, packing_cases(3, 400))


def test_threads_that_share_a_block_pack_alike(race_checked: Path) -> None:
    check_packing(race_checked, 3, packing_cases(4, 100))
