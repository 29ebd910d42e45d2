"""Signed moments by the Triton kernels against their definition, and against the CPU: interpreted without a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradients import assert_signed_holds, convolution_gradients, linear_gradients, normal, output_sides

from lswag_fast import reference
from lswag_fast.ops.gradient_moments import Convolution, MomentsAccumulator, gradient_moments
from lswag_fast.ops.gradient_moments_grouped import (
    MomentProblem,
    gradient_moments_grouped,
    launch_gradient_moments,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("samples", "groups", "tokens", "out", "width", "dtype"),
    [
        (4, 4, 17, 40, 24, BF16),
        (4, 4, 17, 37, 43, FP16),
        (8, 4, 5, 36, 44, FP32),
        (64, 64, 1, 10, 24, BF16),
        (12, 4, 19, 8, 8, FP16),
        (4, 4, 3, 1, 1, FP32),
        (6, 2, 33, 40, 24, FP32),
        (6, 3, 33, 40, 24, FP16),
        (2, 2, 17, 37, 43, FP32),
        (5, 5, 197, 20, 12, BF16),
    ],
)
def test_linear_layers_hold_to_the_definition(
    device: torch.device, samples: int, groups: int, tokens: int, out: int, width: int, dtype: torch.dtype
) -> None:
    a, d = normal(0, samples, tokens, width).to(dtype), (normal(1, samples, tokens, out) + 0.1).to(dtype)
    gradients = linear_gradients([a], [d], groups).groups
    assert_signed_holds(gradient_moments(a.to(device), d.to(device), groups, signed=True, maps=True), gradients)


@pytest.mark.parametrize("groups", [2, 3])
def test_two_or_three_groups_are_summed_in_float64(device: torch.device, groups: int) -> None:
    a, d = normal(2, 6, 33, 24), normal(3, 6, 33, 40)
    moments = gradient_moments(a.to(device), d.to(device), groups, signed=True, maps=True)
    assert_signed_holds(moments, linear_gradients([a], [d], groups).groups, bound=1e-13)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
def test_uses_of_one_weight_are_summed(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    a = [normal(n, 8, t, 24).to(dtypes[0]) for n, t in enumerate((17, 5, 1))]
    d = [normal(n + 9, 8, t, 40).to(dtypes[1]) for n, t in enumerate((17, 5, 1))]
    moments = gradient_moments([t.to(device) for t in a], [t.to(device) for t in d], 4, signed=True, maps=True)
    assert_signed_holds(moments, linear_gradients(a, d, 4).groups)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("convolution", "in_channels", "out_channels"),
    [
        (Convolution((8, 8), stride=(8, 8)), 3, 24),
        (Convolution((3, 2), (2, 1), padding=(1, 0), dilation=(1, 2), groups=2), 6, 8),
        (Convolution((3, 3), padding=(1, 1), groups=5), 5, 5),
    ],
)
def test_convolutions_hold_to_autograd(
    device: torch.device, convolution: Convolution, in_channels: int, out_channels: int, channels_last: bool
) -> None:
    c, size = convolution, 16
    out = output_sides(c, size)
    a, d = normal(0, 4, in_channels, size, size), normal(1, 4, out_channels, *out)
    if channels_last:
        a, d = (t.to(memory_format=torch.channels_last) for t in (a, d))
    moments = gradient_moments(a.to(device), d.to(device), convolution=c, signed=True, maps=True)
    assert_signed_holds(moments, convolution_gradients(a, d, c, 4).groups)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(("samples", "width"), [(2, 17), (5, 197), (64, 1)])
def test_convolutions_of_few_and_many_samples(device: torch.device, samples: int, width: int, depthwise: bool) -> None:
    convolution = Convolution((1, 3), padding=(0, 1), groups=3 if depthwise else 1)
    a, d = normal(0, samples, 3, 1, width), normal(1, samples, 3, 1, width)
    moments = gradient_moments(a.to(device), d.to(device), convolution=convolution, signed=True, maps=True)
    assert_signed_holds(moments, convolution_gradients(a, d, convolution, samples).groups)


def test_gradients_of_one_value_are_dead_and_those_that_change_sign_are_not(device: torch.device) -> None:
    a, d = normal(0, 1, 31, 40).expand(4, -1, -1), normal(1, 1, 31, 16).expand(4, -1, -1)
    same = gradient_moments(a.to(device), d.to(device), signed=True)
    assert same.signed is not None
    assert same.signed.dead == same.dead == same.numel
    assert same.signed.mean_signal_to_noise is None
    assert same.signed.mean_sigma == 0
    assert same.signed.sign_agreement == 1
    turned = d * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(-1, 1, 1)
    moments = gradient_moments(a.to(device), turned.to(device), signed=True)
    assert moments.signed is not None
    assert moments.dead == moments.numel
    assert moments.signed.dead == 0
    assert moments.signed.mean_signal_to_noise == moments.signed.mean_abs_mean == moments.signed.sign_agreement == 0


def test_what_rounding_alone_could_make_is_dead(device: torch.device) -> None:
    a, last_bit = torch.ones(4, 1, 8), torch.tensor([0.0, 1.0, 0.0, 1.0]).view(4, 1, 1) * 2.0**-23
    moments = gradient_moments(a.to(device), (torch.ones(4, 1, 8) + last_bit).to(device), signed=True)
    assert moments.signed is not None
    assert 0 < moments.signed.mean_sigma < reference.DEAD
    assert 0 < moments.mean_sigma < reference.DEAD
    assert moments.signed.dead == moments.dead == 64
    assert moments.signed.mean_signal_to_noise is None


def test_dead_rows_count_as_dead_and_agree_in_nothing(device: torch.device) -> None:
    a, d = normal(0, 8, 9, 48), normal(1, 8, 9, 24)
    a[:, :, 7] = 0
    d[:, :, 3] = 0
    moments = gradient_moments(a.to(device), d.to(device), signed=True, maps=True)
    assert moments.signed is not None
    assert moments.signed.dead == 48 + 24 - 1
    assert_signed_holds(moments, linear_gradients([a], [d], 8).groups)


@pytest.mark.parametrize("magnitude", [1e-30, 1e10])
def test_magnitudes_neither_underflow_nor_overflow(device: torch.device, magnitude: float) -> None:
    a, d = normal(0, 8, 9, 40).to(BF16), (normal(1, 8, 9, 24) * magnitude).to(BF16)
    moments = gradient_moments(a.to(device), d.to(device), 4, signed=True, maps=True)
    assert_signed_holds(moments, linear_gradients([a], [d], 4).groups)


def test_gradients_that_are_not_finite_give_nan(device: torch.device) -> None:
    a, d = normal(0, 4, 3, 16), normal(1, 4, 3, 8)
    d[2, 1, 4] = math.inf
    signed = gradient_moments(a.to(device), d.to(device), signed=True).signed
    assert signed is not None
    values = (signed.mean_signal_to_noise, signed.mean_abs_mean, signed.mean_squared_mean, signed.mean_sigma)
    assert all(value is not None and math.isnan(value) for value in values)
    assert 0 < signed.sign_agreement <= 1


def mixed(device: torch.device) -> list[MomentProblem]:
    """Problems that share a launch: signed or not, with maps or not, of every kernel."""
    image, grads = normal(20, 4, 3, 5, 5).to(device), normal(21, 4, 6, 5, 5).to(device)
    convolution = Convolution((3, 3), padding=(1, 1))
    found = [MomentProblem(image, grads, 4, convolution, signed=signed) for signed in (True, False)]
    for n, (out, width, dtype, groups) in enumerate([(40, 24, BF16, 4), (7, 9, FP32, 2), (36, 72, FP32, 4)]):
        a, d = (normal(n + k, 4, 5, size).to(device, dtype) for k, size in ((30, width), (40, out)))
        found += [MomentProblem(a, d, groups, signed=signed) for signed in (False, True)]
        found.append(MomentProblem(a, d, groups, signed=True, weight=normal(50, out, width).to(device, dtype)))
    return found


def test_a_problem_has_the_same_bits_whatever_shares_its_launch(device: torch.device) -> None:
    together = mixed(device)
    alone = [gradient_moments_grouped([p])[0] for p in together]
    assert gradient_moments_grouped(together) == alone
    assert gradient_moments_grouped(together[::-1]) == alone[::-1]
    assert [m.signed is not None for m in alone] == [p.signed for p in together]


def test_nothing_is_read_that_no_kernel_wrote(device: torch.device, poisoned: Any) -> None:
    with poisoned():
        launched = launch_gradient_moments(mixed(device))._launched
    assert launched is not None
    assert torch.isfinite(launched.results).all()


def test_the_cpu_kernels_take_the_same_problems(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gradient_moments_grouped(mixed(device))
    monkeypatch.setenv("LSWAG_BACKEND", "cpp")
    theirs = gradient_moments_grouped(mixed(torch.device("cpu")))
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got.signed is None) == (wanted.signed is None)
        if got.signed is not None and wanted.signed is not None:
            assert got.signed.dead == wanted.signed.dead
            for name in ("mean_signal_to_noise", "mean_abs_mean", "mean_squared_mean", "mean_sigma", "sign_agreement"):
                assert getattr(got.signed, name) == pytest.approx(getattr(wanted.signed, name), rel=1e-4), name
            assert (got.signed.saliency is None) == (wanted.signed.saliency is None)
            if got.signed.saliency is not None and wanted.signed.absolute_saliency is not None:
                absolute = wanted.signed.absolute_saliency
                assert got.signed.absolute_saliency == pytest.approx(absolute, rel=1e-5)
                assert got.signed.saliency == pytest.approx(wanted.signed.saliency, abs=1e-5 * absolute)


def test_a_scale_that_a_sample_of_elements_got_wrong_is_found_again(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lswag_fast.kernels import gradient_moments_launch as launcher

    monkeypatch.setattr(launcher, "SAMPLED_ELEMENTS", 64)
    a, d = normal(0, 4, 33, 16), normal(1, 4, 33, 16) * 1e-20
    d[:, 10, :] = 1e10 * normal(2, 4, 16)
    problem = MomentProblem(a.to(device), d.to(device), signed=True, maps=True)
    assert_signed_holds(launch_gradient_moments([problem]).finish()[0], linear_gradients([a], [d], 4).groups)


def test_gradients_that_come_one_by_one_hold_to_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device does in torch's operations, done by them on the CPU, beside the C++ that the CPU takes."""
    gradients = [normal(n, 7, 9).double() for n in range(5)]
    for gradient in gradients:
        gradient[3] = 0
        gradient[4] = 0.25
    by_torch, by_cpp = MomentsAccumulator((7, 9), signed=True), MomentsAccumulator((7, 9), signed=True)
    state = torch.zeros(5, 7, 9, dtype=torch.float64)
    for gradient in gradients:
        by_torch._add_on_device(gradient, state)
        by_cpp.add(gradient)
    moments, expected = by_torch._finish_on_device(state, maps=True), by_cpp.finish(maps=True)
    assert_signed_holds(moments, gradients, bound=1e-13)
    assert moments.signed is not None
    assert expected.signed is not None
    assert moments.signed.dead == expected.signed.dead == 18
    assert moments.signed.mean_signal_to_noise == pytest.approx(expected.signed.mean_signal_to_noise, rel=1e-12)
    assert moments.signed.sign_agreement == pytest.approx(expected.signed.sign_agreement, rel=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_gradients_that_come_one_by_one_stay_on_their_device() -> None:
    gradients = [normal(n, 7, 9) for n in range(5)]
    accumulator = MomentsAccumulator((7, 9), signed=True)
    for gradient in gradients:
        accumulator.add(gradient.cuda())
    moments = accumulator.finish(maps=True)
    assert_signed_holds(moments, [g.double() for g in gradients], bound=1e-13)
    assert moments.maps is not None
    assert moments.maps.sigma.is_cuda
