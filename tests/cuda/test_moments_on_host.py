"""The wgmma kernel of gradient moments, run on the CPU as the PTX ISA describes its instructions: no GPU is needed.

Tables come from the code that makes them for a launch; sums are compared with the definition in float64.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lswag_fast import reference
from lswag_fast.kernels.gradient_moments_launch import Placed, _tables
from lswag_fast.kernels.gradient_moments_layout import WGMMA, Weight, layout_of
from lswag_fast.kernels.gradient_moments_shared import FIRST_TILE, SLOT, TILES_OF, A, D

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("moments_on_host.cpp")
BF16, FP16 = torch.bfloat16, torch.float16
EARLY, LATE, MIXED = range(3)
"""When copies and products happen: at once, when they are waited for, or at any time between."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    made = tmp_path_factory.mktemp("host") / "moments_on_host"
    includes = [f"-I{REPOSITORY / 'csrc' / part}" for part in ("include", "cpu", "cuda")]
    options = ["-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Werror", "-DLSWAG_ISA=host"]
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    command = [compiler, *options, *checks, *includes, "-x", "c++", str(SOURCE), "-o", str(made)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return made


def normal(seed: int, *shape: int, magnitude: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * magnitude


def numbers(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


def storage(tensor: Tensor) -> bytes:
    """The memory between a view's first element and its last."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).contiguous().view(torch.int16).numpy().tobytes()


@dataclass
class Linear:
    """A weight: inputs [S, T, I] and output gradients [S, T, O]."""

    inputs: Tensor
    output_grads: Tensor
    groups: int

    def placed(self) -> Placed:
        a, d = (t.transpose(1, 2).unsqueeze(2) for t in (self.inputs, self.output_grads))
        layout = layout_of(Weight([a], [d], self.groups), 90, wgmma=True)
        assert layout.form.kernel is WGMMA
        return Placed(layout, [a, d])

    def magnitudes(self) -> list[int]:
        return [int(t.float().abs().max().view(torch.int32)) for t in (self.inputs, self.output_grads)]


def sums(
    program: Path, weights: Sequence[Linear], *, blocks: int = 2, timing: int = MIXED, seed: int = 0, before: int = 0
) -> list[np.ndarray]:
    """The five sums of every weight; `before` tiles of other kernels come first in the launch."""
    placed = [w.placed() for w in weights]
    tables = _tables(placed, every_element=True)
    (section,) = tables.sections
    operands = [t for w in weights for t in (w.inputs, w.output_grads)]
    uses, problems = tables.uses.copy(), tables.problems.copy()
    slots = problems[:, SLOT.value]
    uses[:, A.value], uses[:, D.value] = 2 * slots, 2 * slots + 1
    problems[:, FIRST_TILE.value] += before
    half = weights[0].inputs.dtype == FP16
    given = numbers(1, timing, seed, blocks, half, len(operands))
    given += b"".join(numbers(len(memory)) + memory for memory in map(storage, operands))
    given += numbers(len(weights), before, section.end_tile + before)
    magnitudes = np.array([bits for w in weights for bits in w.magnitudes()], np.int32)
    given += problems.tobytes() + numbers(len(uses)) + uses.tobytes() + (tables.ends + before).tobytes()
    given += numbers(len(magnitudes)) + magnitudes.tobytes()
    run = subprocess.run([program], input=given, capture_output=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr.decode()[-3000:]
    partials = np.frombuffer(run.stdout).reshape(-1, 5)
    assert np.isnan(partials[:before]).all()
    assert len(partials) == section.end_tile + before
    found = [np.empty(0)] * len(weights)
    for row in problems:
        begin = row[FIRST_TILE.value]
        found[row[SLOT.value]] = partials[begin : begin + row[TILES_OF.value]].sum(0)
    return found


def expected(weight: Linear) -> np.ndarray:
    """The five sums by the definition, in the kernel's scale."""
    a, d = weight.inputs, weight.output_grads
    gradients = (d.double().transpose(1, 2) @ a.double()).unflatten(0, (weight.groups, -1)).sum(1)
    exponents = [(bits >> 23) - 127 for bits in weight.magnitudes()]
    moments = reference.moments_of(list(gradients * 2.0 ** (24 - sum(exponents))))
    mean, sigma, live = moments.mean_abs, moments.sigma, ~moments.dead
    of_live = [live.sum(), (1 / sigma[live]).sum(), (mean[live] / sigma[live]).sum()]
    return np.array([float(x) for x in (*of_live, sigma.sum(), mean.sum())])


def drawn(samples: int, tokens: int, out: int, width: int, groups: int = 0, dtype: torch.dtype = BF16) -> Linear:
    a, d = normal(1, samples, tokens, width).to(dtype), normal(2, samples, tokens, out, magnitude=1e-3).to(dtype)
    return Linear(a, d, groups or samples)


def assert_holds(found: np.ndarray, weight: Linear) -> None:
    wanted = expected(weight)
    assert found[0] == wanted[0]
    # Sums of 1/sigma over two or three groups hang on rounding.
    tight = slice(1, 5) if weight.groups >= 4 else slice(3, 5)
    np.testing.assert_allclose(found[tight], wanted[tight], rtol=1e-5)


@pytest.mark.parametrize("timing", [EARLY, LATE, MIXED])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 197])
def test_sums_hold_to_the_definition(program: Path, tokens: int, timing: int) -> None:
    weight = drawn(5, tokens, 72, 136)
    assert_holds(sums(program, [weight], timing=timing)[0], weight)


@pytest.mark.parametrize(
    ("samples", "groups", "tokens", "out", "width", "dtype"),
    [
        (2, 2, 197, 128, 128, BF16),
        (5, 5, 40, 8, 8, BF16),
        (5, 5, 40, 128, 256, BF16),
        (5, 5, 40, 64, 120, FP16),
        (4, 4, 33, 192, 24, FP16),
        (8, 4, 50, 136, 72, BF16),
        (40, 4, 21, 24, 40, BF16),
        (16, 16, 3, 264, 8, BF16),
    ],
)
def test_shapes_hold_to_the_definition(
    program: Path, samples: int, groups: int, tokens: int, out: int, width: int, dtype: torch.dtype
) -> None:
    weight = drawn(samples, tokens, out, width, groups, dtype)
    assert_holds(sums(program, [weight])[0], weight)


def several(dtype: torch.dtype = BF16) -> list[Linear]:
    shapes = [(4, 20, 136, 24), (4, 70, 40, 200), (4, 5, 128, 128), (4, 130, 264, 8)]
    return [drawn(*shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_weights_share_a_launch(program: Path, dtype: torch.dtype) -> None:
    weights = several(dtype)
    for found, weight in zip(sums(program, weights, blocks=3, before=3), weights, strict=True):
        assert_holds(found, weight)


def test_bits_depend_on_nothing_but_the_weight(program: Path) -> None:
    weights = several()
    together = sums(program, weights, blocks=1, timing=EARLY)
    for blocks, timing in ((2, LATE), (5, MIXED), (9, MIXED)):
        for found, one in zip(sums(program, weights, blocks=blocks, timing=timing), together, strict=True):
            assert found.tobytes() == one.tobytes()
    for weight, one in zip(weights, together, strict=True):
        assert sums(program, [weight])[0].tobytes() == one.tobytes()


def test_any_order_of_events_gives_the_same(program: Path) -> None:
    # One chunk a tile for some, more chunks a sample than there are stages for others.
    weights = [drawn(4, 3, 136, 8), drawn(4, 460, 8, 8), drawn(6, 65, 64, 8), drawn(4, 64, 72, 136)]
    expected_bits = [s.tobytes() for s in sums(program, weights, blocks=2, timing=EARLY)]
    for seed in range(10):
        found = sums(program, weights, blocks=1 + seed % 4, seed=seed)
        assert [s.tobytes() for s in found] == expected_bits


def within(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """The same values amid NaN, so that rows and samples have gaps."""
    samples, tokens, channels = tensor.shape
    wide = torch.full((samples, tokens + rows, channels + columns), float("nan"), dtype=tensor.dtype)
    wide[:, :tokens, :channels] = tensor
    return wide[:, :tokens, :channels]


@pytest.mark.parametrize(("groups", "tokens"), [(8, 33), (4, 33), (8, 64), (4, 64)])
def test_views_are_read_in_place(program: Path, groups: int, tokens: int) -> None:
    plain = drawn(8, tokens, 72, 136, groups)
    first = Linear(within(plain.inputs, 0, 24), within(plain.output_grads, 3, 8), groups)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (plain.inputs, plain.output_grads)]
    repeated = Linear(plain.inputs[:1].expand(8, -1, -1), plain.output_grads, groups)
    for weight in (first, Linear(turned[0], turned[1], groups), repeated):
        assert_holds(sums(program, [weight])[0], weight)


def test_equal_magnitudes_are_exactly_dead(program: Path) -> None:
    a = normal(1, 1, 50, 136).to(BF16).expand(8, -1, -1)
    d = normal(2, 1, 50, 72).to(BF16) * torch.tensor([1, -1] * 4, dtype=BF16).view(-1, 1, 1)
    found = sums(program, [Linear(a, d, 8)])[0]
    assert found[:4].tolist() == [0, 0, 0, 0]
    assert found[4] == pytest.approx(expected(Linear(a, d, 8))[4], rel=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-19, 1e10])
def test_magnitudes_neither_underflow_nor_overflow(program: Path, magnitude: float) -> None:
    a, d = normal(1, 8, 33, 40).to(BF16), normal(2, 8, 33, 24, magnitude=magnitude).to(BF16)
    assert_holds(sums(program, [Linear(a, d, 8)])[0], Linear(a, d, 8))


def test_a_number_that_is_not_finite_is_seen(program: Path) -> None:
    weight = drawn(5, 20, 72, 136)
    weight.inputs[3, 7, 100] = float("nan")
    assert np.isnan(sums(program, [weight])[0][1:]).all()


def test_other_operands_are_left_to_triton() -> None:
    def kernel(a: Tensor, d: Tensor, groups: int, **options: bool) -> object:
        weight = Weight([a.transpose(1, 2).unsqueeze(2)], [d.transpose(1, 2).unsqueeze(2)], groups, **options)
        return layout_of(weight, 90, wgmma=True).form.kernel

    a, d = torch.zeros(8, 5, 24, dtype=BF16), torch.zeros(8, 5, 16, dtype=BF16)
    assert kernel(a, d, 8) is WGMMA
    assert kernel(a.half(), d.half(), 4) is WGMMA
    others = [
        (a.float(), d.float(), 8, {}),
        (a, d.half(), 8, {}),
        (a.half(), d.half(), 2, {}),
        (a[..., :20], d, 8, {}),
        (a, d[..., 4:12], 8, {}),
        (a.transpose(1, 2).contiguous().transpose(1, 2), d, 8, {}),
        (a, d, 8, {"signed": True}),
        (a, d, 8, {"maps": True}),
    ]
    for given_a, given_d, groups, options in others:
        assert kernel(given_a, given_d, groups, **options) is not WGMMA
    weight = Weight([a.transpose(1, 2).unsqueeze(2)], [d.transpose(1, 2).unsqueeze(2)], 8)
    assert layout_of(weight, 90).form.kernel is not WGMMA
