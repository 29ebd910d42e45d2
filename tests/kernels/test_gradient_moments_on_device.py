"""The compiled Triton kernels at the layer sizes of AutoFormer, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from gradients import convolution_gradients
from moments_on_device import TOKENS, assert_holds, device, fresh, in_wider, linear, poison
from torch import Tensor

from lswag_fast import reference
from lswag_fast.ops.gradient_moments import Convolution, GradientMoments
from lswag_fast.ops.gradient_moments_grouped import MomentProblem, gradient_moments_grouped, launch_gradient_moments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

LAYERS = [(576, 192), (192, 192), (756, 216), (216, 756), (840, 240), (240, 960), (960, 240)]
"""[O, I] of the matrices of AutoFormer-Tiny's blocks; 756 is divisible by 4 only."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("samples", "groups"), [(16, 16), (16, 4)])
def test_the_layers_of_autoformer_hold_to_float64(samples: int, groups: int, dtype: torch.dtype) -> None:
    operands = [linear(out, width, samples, dtype, groups=groups, maps=True) for out, width in LAYERS]
    poison()
    for (a, d, _), moments in zip(operands, gradient_moments_grouped([p for *_, p in operands]), strict=True):
        assert_holds(moments, reference.gradient_moments(a, d, groups), 1e-5)


def test_tf32_holds_to_its_own_precision() -> None:
    a, d, problem = linear(240, 960, 16, torch.float32, tf32=True)
    assert_holds(gradient_moments_grouped([problem])[0], reference.gradient_moments(a, d, 16), 5e-3)


@pytest.mark.parametrize("groups", [2, 3])
def test_few_groups_hold_weight_by_weight(groups: int) -> None:
    a, d, problem = linear(240, 320, 6, torch.float32, groups=groups, maps=True)
    moments = gradient_moments_grouped([problem])[0]
    expected = reference.gradient_moments(a, d, groups)
    assert moments.maps is not None
    bound = 1e-5 * groups * expected.mean_abs
    assert torch.all((moments.maps.sigma.cpu() - expected.sigma).abs() <= bound)
    assert moments.dead == int(expected.dead.sum())


def assert_signed_holds(moments: GradientMoments, gradients: Tensor, weight: Tensor | None = None) -> None:
    """Holds signed moments, and the saliencies of a weight, to those of group gradients [G, O, I] in float64."""
    mean, sigma = gradients.mean(0), gradients.std(0, correction=0)
    signed, maps = moments.signed, moments.maps
    assert signed is not None
    assert signed.dead == int((sigma <= reference.DEAD * mean.abs()).sum())
    assert signed.mean_signal_to_noise == pytest.approx((mean / sigma).square().mean().item(), rel=1e-4)
    assert signed.mean_abs_mean == pytest.approx(mean.abs().mean().item(), rel=1e-5)
    assert signed.mean_squared_mean == pytest.approx(mean.square().mean().item(), rel=1e-5)
    assert signed.mean_sigma == pytest.approx(sigma.mean().item(), rel=1e-5)
    agreement = gradients.sign().sum(0).abs().mean().item() / len(gradients)
    assert signed.sign_agreement == pytest.approx(agreement, rel=1e-3)
    assert (signed.saliency is None) == (weight is None)
    if weight is not None:
        products = mean * weight.cpu().double().view(mean.shape)
        scale = products.abs().sum().item()
        assert signed.saliency == pytest.approx(products.sum().item(), abs=1e-5 * scale)
        assert signed.absolute_saliency == pytest.approx(scale, rel=1e-5)
    if maps is not None:
        slack = 1e-5 * gradients.abs().max()
        for got, wanted in ((maps.signed_mean, mean), (maps.signed_sigma, sigma)):
            assert got is not None
            assert torch.all((got.cpu() - wanted).abs() <= slack)


@pytest.mark.parametrize("asked", ["", "weight", "weight and maps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_signed_moments_hold_to_float64(dtype: torch.dtype, asked: str) -> None:
    weights = [in_wider(fresh(out, width, dtype=dtype).to(device())) if asked else None for out, width in LAYERS]
    operands = [
        linear(out, width, 16, dtype, signed=True, maps="maps" in asked, weight=weight)
        for (out, width), weight in zip(LAYERS, weights, strict=True)
    ]
    poison()
    found = gradient_moments_grouped([p for *_, p in operands])
    for (a, d, _), weight, moments in zip(operands, weights, found, strict=True):
        assert_holds(moments, reference.gradient_moments(a, d, 16), 1e-5)
        assert_signed_holds(moments, d.double().transpose(1, 2) @ a.double(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_patch_embedding_holds_to_float64(dtype: torch.dtype) -> None:
    a, d = fresh(8, 3, 224, 224, dtype=dtype), fresh(8, 240, 14, 14, dtype=dtype)
    convolution = Convolution((16, 16), (16, 16))
    weight = fresh(240, 3, 16, 16, dtype=dtype).to(device())
    problem = MomentProblem(a.to(device()), d.to(device()), convolution=convolution, signed=True, weight=weight)
    patches = a.unflatten(2, (14, 16)).unflatten(4, (14, 16)).permute(0, 2, 4, 1, 3, 5).reshape(8, 196, 768)
    expected = reference.gradient_moments(patches, d.flatten(2).transpose(1, 2), 8)
    moments = gradient_moments_grouped([problem])[0]
    assert_holds(moments, expected, 1e-5)
    assert_signed_holds(moments, d.double().flatten(2) @ patches.double(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 56), (3, 2, 28), (5, 1, 14), (7, 1, 7)])
def test_depthwise_convolutions_hold_to_float64(
    kernel: int, stride: int, size: int, channels_last: bool, dtype: torch.dtype
) -> None:
    a = fresh(8, 100, size, size, dtype=dtype)
    d = fresh(8, 100, size // stride, size // stride, dtype=dtype, magnitude=1e-4)
    convolution = Convolution((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), groups=100)
    gradients = convolution_gradients(a, d, convolution, 4).groups
    given = [t.to(device(), memory_format=torch.channels_last) if channels_last else t.to(device()) for t in (a, d)]
    poison()
    weight = fresh(100, 1, kernel, kernel, dtype=dtype).to(device())
    problem = MomentProblem(given[0], given[1], 4, convolution, signed=True, maps=True, weight=weight)
    moments = gradient_moments_grouped([problem])[0]
    assert_holds(moments, reference.moments_of(gradients), 1e-5)
    assert_signed_holds(moments, torch.stack(gradients), weight)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-19, 1e10])
def test_magnitudes_neither_underflow_nor_overflow(magnitude: float) -> None:
    a, d = fresh(8, TOKENS, 192, dtype=torch.bfloat16), fresh(8, TOKENS, 200, dtype=torch.bfloat16, magnitude=magnitude)
    moments = gradient_moments_grouped([MomentProblem(a.to(device()), d.to(device()))])[0]
    assert_holds(moments, reference.gradient_moments(a, d, 8), 1e-5)


def test_equal_magnitudes_are_exactly_dead() -> None:
    a = fresh(1, TOKENS, 192, dtype=torch.bfloat16).expand(8, -1, -1)
    d = fresh(1, TOKENS, 200, dtype=torch.bfloat16) * torch.tensor([1, -1] * 4, dtype=torch.bfloat16).view(-1, 1, 1)
    moments = gradient_moments_grouped([MomentProblem(a.to(device()), d.to(device()))])[0]
    assert moments.dead == moments.numel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_are_the_same_run_to_run_and_in_every_grouping(dtype: torch.dtype) -> None:
    problems = [linear(out, width, 16, dtype)[2] for out, width in LAYERS for _ in range(3)]
    together = gradient_moments_grouped(problems)
    for _ in range(5):
        poison()
        assert gradient_moments_grouped(problems) == together
    assert gradient_moments_grouped(problems[::-1]) == together[::-1]
    assert [gradient_moments_grouped([p])[0] for p in problems] == together
    poison()
    parts = [launch_gradient_moments(problems[n : n + 4]) for n in range(0, len(problems), 4)]
    assert [m for part in parts for m in part.finish()] == together


def test_a_launch_waits_for_nothing() -> None:
    problems = [linear(out, width, 16, torch.bfloat16)[2] for out, width in LAYERS]
    expected = gradient_moments_grouped(problems)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = launch_gradient_moments(problems)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.finish() == expected


def test_a_captured_graph_follows_its_operands() -> None:
    problems = [linear(out, width, 16, torch.bfloat16)[2] for out, width in LAYERS]
    gradient_moments_grouped(problems)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch_gradient_moments(problems)
    assert captured.sums is not None
    for _ in range(3):
        for problem in problems:
            problem.inputs.copy_(fresh(*problem.inputs.shape, dtype=torch.bfloat16))
        # What the host's memory held while the graph was captured must not matter any more.
        others = [linear(out, width, 16, torch.bfloat16)[2] for out, width in LAYERS]
        gradient_moments_grouped(others)
        graph.replay()
        replayed = captured.sums.clone()
        directly = launch_gradient_moments(problems)
        assert directly.sums is not None
        assert torch.equal(replayed, directly.sums)


def test_memory_beside_the_operands_is_small() -> None:
    problems = [linear(out, width, 64, torch.bfloat16)[2] for out, width in LAYERS]
    gradient_moments_grouped(problems)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient_moments_grouped(problems)
    assert torch.cuda.max_memory_allocated() - before < 2**20
