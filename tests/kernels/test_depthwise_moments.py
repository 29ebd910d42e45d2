"""Depthwise convolutions by their Triton kernel against autograd in float64: interpreted without a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from gradients import Gradients, convolution_gradients, linear_gradients, normal, uniform
from torch import Tensor

from lswag_fast import reference
from lswag_fast.ops.gradient_moments import Convolution, GradientMoments, gradient_moments
from lswag_fast.ops.gradient_moments_grouped import MomentProblem, gradient_moments_grouped

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def depthwise(channels: int, kernel: tuple[int, int], **options: tuple[int, int]) -> Convolution:
    return Convolution(kernel, groups=channels, **options)


LAYERS = {
    "3x3": (depthwise(6, (3, 3), padding=(1, 1)), 1, (7, 7)),
    "3x3 stride 2": (depthwise(5, (3, 3), stride=(2, 2), padding=(1, 1)), 1, (9, 11)),
    "5x5 unpadded": (depthwise(5, (5, 5)), 1, (9, 6)),
    "dilated, uneven": (depthwise(4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 3)), 1, (11, 13)),
    "rows wider than a step": (depthwise(3, (1, 3), padding=(0, 1)), 1, (2, 41)),
    "one-dimensional": (depthwise(9, (1, 4), padding=(0, 3)), 1, (1, 19)),
    "1x1": (depthwise(5, (1, 1)), 1, (4, 4)),
    "padding beyond the kernel": (depthwise(3, (1, 1), padding=(3, 3)), 1, (4, 5)),
    "multiplier 3": (depthwise(3, (3, 3), padding=(1, 1)), 3, (6, 5)),
}


def assert_holds(moments: GradientMoments, gradients: Gradients) -> None:
    """Holds maps to 1e-6 of the largest gradient (2^-40 where float64 is summed), and for G >= 4 log terms to 1e-5."""
    expected = reference.moments_of(gradients.groups)
    assert moments.maps is not None
    in_float64 = len(gradients.groups) <= 3 and not gradients.all_bfloat16
    slack = (2.0**-40 if in_float64 else 1e-6) * torch.stack(gradients.groups).abs().max()
    for got, wanted in ((moments.maps.sigma, expected.sigma), (moments.maps.mean_abs, expected.mean_abs)):
        assert got.shape == wanted.shape
        assert torch.all((got.cpu() - wanted).abs() <= slack)
    assert moments.numel == expected.numel
    assert moments.dead == int(expected.dead.sum())
    assert moments.mean_sigma == pytest.approx(expected.sigma.mean().item(), rel=1e-5)
    assert moments.mean_abs_gradient == pytest.approx(expected.mean_abs.mean().item(), rel=1e-5)
    if len(gradients.groups) >= 4:
        assert moments.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=1e-5)
        assert moments.log_sum_mean_over_sigma == pytest.approx(expected.log_sum_mean_over_sigma, abs=1e-5)


def operands(name: str, samples: int, dtypes: Sequence[torch.dtype] = (FP32, FP32)) -> tuple[Tensor, Tensor]:
    c, multiplier, plane = LAYERS[name]
    out = [
        (size + 2 * p - (k - 1) * r - 1) // s + 1
        for size, k, s, p, r in zip(plane, c.kernel_size, c.stride, c.padding, c.dilation, strict=True)
    ]
    a, d = normal(0, samples, c.groups, *plane), normal(1, samples, c.groups * multiplier, *out)
    return a.to(dtypes[0]), d.to(dtypes[1])


@pytest.fixture(autouse=True)
def nothing_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No depthwise convolution takes the kernel of general windows."""
    from lswag_fast.kernels import gradient_moments_layout

    monkeypatch.setattr(gradient_moments_layout, "moments_of_windows", None)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_hold_to_autograd(device: torch.device, name: str) -> None:
    samples = 8 if name == "3x3" else 4
    a, d = operands(name, samples)
    moments = gradient_moments(a.to(device), d.to(device), 4, convolution=LAYERS[name][0], maps=True)
    assert_holds(moments, convolution_gradients(a, d, LAYERS[name][0], 4))


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("groups", [2, 4])
def test_dtypes_hold_to_autograd(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], groups: int) -> None:
    a, d = operands("3x3 stride 2", 4, dtypes)
    convolution = LAYERS["3x3 stride 2"][0]
    moments = gradient_moments(a.to(device), d.to(device), groups, convolution=convolution, signed=True, maps=True)
    gradients = convolution_gradients(a, d, convolution, groups)
    assert_holds(moments, gradients)
    stacked = torch.stack(gradients.groups)
    assert moments.signed is not None
    assert moments.signed.mean_sigma == pytest.approx(stacked.std(0, correction=0).mean().item(), rel=1e-5)
    assert moments.signed.sign_agreement == pytest.approx(stacked.sign().sum(0).abs().mean().item() / groups, rel=1e-6)


@pytest.mark.parametrize(("samples", "groups", "width"), [(2, 2, 5), (64, 64, 5), (64, 4, 5), (5, 5, 1), (5, 5, 197)])
def test_few_and_many_samples(device: torch.device, samples: int, groups: int, width: int) -> None:
    a, d = normal(0, samples, 3, 1, width), normal(1, samples, 3, 1, width)
    convolution = depthwise(3, (1, 3), padding=(0, 1))
    moments = gradient_moments(a.to(device), d.to(device), groups, convolution=convolution, maps=True)
    assert_holds(moments, convolution_gradients(a, d, convolution, groups))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return tensor.to(memory_format=torch.channels_last)
    if layout == "transposed plane":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    samples, channels, height, width = tensor.shape
    wide = torch.full((samples, 2 * channels, height + 1, width + 3), math.nan, dtype=tensor.dtype)
    wide[:, ::2, 1:, 1:-2] = tensor
    return wide[:, ::2, 1:, 1:-2]


@pytest.mark.parametrize("layout", ["channels last", "transposed plane", "slice"])
def test_views_are_read_in_place(device: torch.device, layout: str) -> None:
    a, d = operands("dilated, uneven", 4)
    convolution = LAYERS["dilated, uneven"][0]
    views = [laid_out(t, layout).to(device) for t in (a, d)]
    moments = gradient_moments(*views, convolution=convolution, maps=True)
    assert_holds(moments, convolution_gradients(a, d, convolution, 4))


def test_uses_of_one_kernel_are_summed(device: torch.device) -> None:
    names = ("3x3", "3x3")
    convolution = LAYERS["3x3"][0]
    uses = [operands(name, 4) for name in names]
    uses[1] = (uses[1][0][..., 1:], uses[1][1][..., 1:] * 2)
    a, d = zip(*uses, strict=True)
    expected = [convolution_gradients(*use, convolution, 4) for use in uses]
    moments = gradient_moments([t.to(device) for t in a], [t.to(device) for t in d], convolution=convolution, maps=True)
    summed = [x + y for x, y in zip(expected[0].groups, expected[1].groups, strict=True)]
    absolute = [x + y for x, y in zip(expected[0].absolute, expected[1].absolute, strict=True)]
    assert_holds(moments, Gradients(summed, absolute, 2 * expected[0].terms, False))


def test_sums_of_biased_terms_hold(device: torch.device) -> None:
    a, d = uniform(0, 8, 2, 20, 20), normal(1, 8, 2, 20, 20) + 1
    convolution = depthwise(2, (3, 3), padding=(1, 1))
    moments = gradient_moments(a.to(device), d.to(device), 4, convolution=convolution, maps=True)
    assert_holds(moments, convolution_gradients(a, d, convolution, 4))


def test_channels_without_gradient_are_dead(device: torch.device) -> None:
    a, d = operands("3x3", 4)
    d[:, 2] = 0
    moments = gradient_moments(a.to(device), d.to(device), convolution=LAYERS["3x3"][0], maps=True)
    assert moments.dead == 9
    assert_holds(moments, convolution_gradients(a, d, LAYERS["3x3"][0], 4))


def test_a_layer_has_the_same_bits_whatever_shares_its_launch(device: torch.device) -> None:
    problems = [
        MomentProblem(*(t.to(device) for t in operands(name, 4)), convolution=LAYERS[name][0], signed=signed)
        for name, signed in (("1x1", False), ("3x3", True), ("multiplier 3", True), ("3x3 stride 2", False))
    ]
    a, d = normal(0, 4, 5, 24), normal(1, 4, 5, 16)
    problems.append(MomentProblem(a.to(device), d.to(device)))
    alone = [gradient_moments_grouped([p])[0] for p in problems]
    assert gradient_moments_grouped(problems) == alone
    assert gradient_moments_grouped(problems[::-1]) == alone[::-1]
    expected = linear_gradients([a], [d], 4)
    assert alone[-1].mean_abs_gradient == pytest.approx(torch.stack(expected.groups).abs().mean().item(), rel=1e-5)
