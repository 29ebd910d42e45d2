"""The Triton kernels against the definition: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lswag_fast import reference
from lswag_fast.errors import InputError
from lswag_fast.ops.gradient_moments import Convolution, GradientMoments, gradient_moments
from lswag_fast.ops.gradient_moments_grouped import MomentProblem, gradient_moments_grouped, launch_gradient_moments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_gradients(inputs: Sequence[Tensor], output_grads: Sequence[Tensor], groups: int) -> list[Tensor]:
    """Group gradients in float64 of a weight with one use or several."""
    total: Tensor | int = 0
    for a, d in zip(inputs, output_grads, strict=True):
        rows_a, rows_d = (t.double().cpu().reshape(len(t), -1, t.shape[-1]) for t in (a, d))
        total = total + rows_d.transpose(1, 2) @ rows_a
    assert isinstance(total, Tensor)
    return list(total.unflatten(0, (groups, -1)).mean(1))


def convolution_gradients(a: Tensor, d: Tensor, convolution: Convolution, groups: int) -> list[Tensor]:
    c = convolution
    weight = torch.zeros(d.shape[1], a.shape[1] // c.groups, *c.kernel_size, dtype=torch.float64, requires_grad=True)
    size = len(a) // groups
    gradients = []
    for k in range(groups):
        part = slice(k * size, (k + 1) * size)
        out = F.conv2d(a[part].double().cpu(), weight, None, c.stride, c.padding, c.dilation, c.groups)
        gradients.append(torch.autograd.grad(out, weight, d[part].double().cpu())[0] / size)
    return gradients


def assert_holds(moments: GradientMoments, gradients: list[Tensor], tolerance: float = 1e-5) -> None:
    expected = reference.moments_of(gradients)
    assert moments.numel == expected.numel
    assert moments.maps is not None
    largest = torch.stack(gradients).abs().amax(0)
    slack = 1e-6 * largest.max()
    for got, wanted in ((moments.maps.sigma, expected.sigma), (moments.maps.mean_abs, expected.mean_abs)):
        assert got.shape == wanted.shape
        assert torch.all((got.cpu() - wanted).abs() <= slack)
    assert moments.dead == int(expected.dead.sum())
    assert moments.mean_sigma == pytest.approx(expected.sigma.mean().item(), rel=1e-5)
    assert moments.mean_abs_gradient == pytest.approx(expected.mean_abs.mean().item(), rel=1e-5)
    if len(gradients) >= 4:
        assert moments.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=tolerance)
        assert moments.log_sum_mean_over_sigma == pytest.approx(expected.log_sum_mean_over_sigma, abs=tolerance)
    else:
        assert torch.all((moments.maps.sigma.cpu() - expected.sigma).abs() <= tolerance * largest)


@pytest.mark.parametrize(
    ("samples", "groups", "tokens", "out", "width", "dtype"),
    [
        (4, 4, 17, 40, 24, BF16),
        (4, 4, 17, 40, 24, FP16),
        (4, 4, 17, 40, 24, FP32),
        (8, 4, 5, 36, 44, BF16),
        (8, 4, 5, 37, 43, BF16),
        (6, 6, 16, 33, 65, FP32),
        (64, 64, 1, 10, 24, BF16),
        (64, 4, 1, 10, 24, FP32),
        (4, 4, 197, 24, 16, FP32),
        (4, 4, 197, 20, 12, BF16),
        (2, 2, 17, 37, 43, FP32),
        (2, 2, 197, 9, 40, FP16),
        (5, 5, 17, 37, 43, BF16),
        (64, 64, 17, 9, 24, BF16),
        (64, 4, 17, 24, 9, FP16),
        (12, 4, 19, 8, 8, FP16),
        (4, 4, 3, 1, 1, FP32),
    ],
)
def test_linear_layers_hold_to_the_definition(
    device: torch.device, samples: int, groups: int, tokens: int, out: int, width: int, dtype: torch.dtype
) -> None:
    a, d = normal(0, samples, tokens, width).to(device, dtype), normal(1, samples, tokens, out).to(device, dtype)
    assert_holds(gradient_moments(a, d, groups, maps=True), linear_gradients([a], [d], groups))


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-5), (FP16, 1e-5), (BF16, 2e-2)])
def test_few_groups_hold_weight_by_weight(
    device: torch.device, dtype: torch.dtype, tolerance: float, groups: int
) -> None:
    a, d = normal(2, 6, 33, 24).to(device, dtype), normal(3, 6, 33, 40).to(device, dtype)
    assert_holds(gradient_moments(a, d, groups, maps=True), linear_gradients([a], [d], groups), tolerance)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    samples, tokens, channels = tensor.shape
    if layout == "sequence first":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels apart":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "broadcast":
        return tensor[:1].expand(samples, -1, -1)
    ends = (5, 3) if layout == "odd slice" else (16, 8)
    wide = torch.full((samples, tokens + 2, channels + sum(ends)), math.nan, dtype=tensor.dtype, device=tensor.device)
    wide[:, 1:-1, ends[0] : -ends[1]] = tensor
    return wide[:, 1:-1, ends[0] : -ends[1]]


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("layout", ["sequence first", "channels apart", "slice", "odd slice", "broadcast"])
@pytest.mark.parametrize("groups", [4, 8])
def test_views_are_read_in_place(device: torch.device, layout: str, dtype: torch.dtype, groups: int) -> None:
    a = laid_out(normal(0, 8, 18, 24).to(device, dtype), layout)
    d = laid_out(normal(1, 8, 18, 40).to(device, dtype), "slice" if layout == "broadcast" else layout)
    assert_holds(gradient_moments(a, d, groups, maps=True), linear_gradients([a], [d], groups))


def test_tokens_may_span_several_dimensions(device: torch.device) -> None:
    a, d = normal(0, 4, 3, 5, 16).to(device), normal(1, 4, 5, 3, 24).transpose(1, 2).to(device)
    assert_holds(gradient_moments(a, d, maps=True), linear_gradients([a], [d], 4))


def test_dead_rows_and_columns_are_counted_and_left_out(device: torch.device) -> None:
    a, d = normal(0, 8, 9, 48).to(device), normal(1, 8, 9, 24).to(device)
    a[:, :, 7] = 0
    d[:, :, 3] = 0
    moments = gradient_moments(a, d, maps=True)
    assert moments.dead == 48 + 24 - 1
    assert_holds(moments, linear_gradients([a], [d], 8))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_equal_magnitudes_are_exactly_dead(device: torch.device, dtype: torch.dtype) -> None:
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    a = normal(0, 1, 31, 40).expand(5, -1, -1).to(device, dtype)
    d = (normal(1, 1, 31, 16) * signs.view(-1, 1, 1)).to(device, dtype)
    moments = gradient_moments(a, d, maps=True)
    assert moments.dead == moments.numel == 640
    assert moments.log_sum_inverse_sigma is None
    assert moments.mean_sigma == 0
    assert moments.mean_abs_gradient > 0
    assert moments.maps is not None
    assert not moments.maps.sigma.any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-19, 1e10, 1e30])
def test_magnitudes_neither_underflow_nor_overflow(device: torch.device, dtype: torch.dtype, magnitude: float) -> None:
    a, d = normal(0, 8, 9, 40).to(device, dtype), (normal(1, 8, 9, 24) * magnitude).to(device, dtype)
    assert_holds(gradient_moments(a, d, 4, maps=True), linear_gradients([a], [d], 4))


@pytest.mark.parametrize(("rest", "outlier"), [(1e-20, 1e10), (0.0, 1e-25)])
def test_a_scale_that_a_sample_of_elements_got_wrong_is_found_again(
    device: torch.device, rest: float, outlier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lswag_fast.kernels import gradient_moments_launch as launcher

    monkeypatch.setattr(launcher, "SAMPLED_ELEMENTS", 64)
    a, d = normal(0, 4, 33, 16).to(device), (normal(1, 4, 33, 16) * rest).to(device)
    d[:, 10, :] = outlier * normal(2, 4, 16).to(device)
    assert not launch_gradient_moments([MomentProblem(a, d)])._launched.everything_seen[0]
    assert_holds(gradient_moments(a, d, maps=True), linear_gradients([a], [d], 4))


def test_gradients_that_are_not_finite_give_nan(device: torch.device) -> None:
    a, d = normal(0, 4, 3, 16).to(device), normal(1, 4, 3, 8).to(device)
    d[2, 1, 4] = math.inf
    moments = gradient_moments(a, d)
    assert math.isnan(moments.log_sum_inverse_sigma or 0.0)
    assert math.isnan(moments.mean_sigma)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
def test_uses_of_one_weight_are_summed(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    a = [normal(n, 8, t, 24).to(device, dtypes[0]) for n, t in enumerate((17, 5, 1))]
    d = [normal(n + 9, 8, t, 40).to(device, dtypes[1]) for n, t in enumerate((17, 5, 1))]
    assert_holds(gradient_moments(a, d, 4, maps=True), linear_gradients(a, d, 4))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("convolution", "in_channels", "out_channels", "size", "dtype"),
    [
        (Convolution((8, 8), stride=(8, 8)), 3, 24, 16, BF16),
        (Convolution((3, 3), padding=(1, 1)), 5, 33, 6, FP32),
        (Convolution((3, 2), (2, 1), padding=(1, 0), dilation=(1, 2), groups=2), 6, 8, 7, FP32),
        (Convolution((3, 3), padding=(1, 1), groups=5), 5, 10, 5, BF16),
        (Convolution((1, 1)), 16, 24, 4, FP16),
        (Convolution((1, 1), stride=(2, 2)), 16, 24, 5, FP32),
    ],
)
def test_convolutions_hold_to_autograd(
    device: torch.device,
    convolution: Convolution,
    in_channels: int,
    out_channels: int,
    size: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    c = convolution
    out = [
        (size + 2 * p - (k - 1) * r - 1) // s + 1
        for k, s, p, r in zip(c.kernel_size, c.stride, c.padding, c.dilation, strict=True)
    ]
    a, d = normal(0, 4, in_channels, size, size).to(dtype), normal(1, 4, out_channels, *out).to(dtype)
    if channels_last:
        a, d = (t.to(memory_format=torch.channels_last) for t in (a, d))
    a, d = a.to(device), d.to(device)
    moments = gradient_moments(a, d, convolution=convolution, maps=True)
    assert_holds(moments, convolution_gradients(a, d, convolution, 4))


@pytest.mark.parametrize(
    ("samples", "groups", "plane"),
    [(2, 2, (4, 3)), (64, 64, (4, 3)), (64, 4, (4, 3)), (5, 5, (1, 1)), (5, 5, (1, 197))],
)
def test_convolutions_of_few_and_many_samples(
    device: torch.device, samples: int, groups: int, plane: tuple[int, int]
) -> None:
    # Channels of a wider network, as a slice has them.
    a, d = normal(0, samples, 5, *plane)[:, 1:4].to(device), normal(1, samples, 9, *plane)[:, :7].to(device)
    convolution = Convolution((3, 3), padding=(1, 1))
    moments = gradient_moments(a, d, groups, convolution=convolution, maps=True)
    assert_holds(moments, convolution_gradients(a, d, convolution, groups))


def test_padding_at_the_end_of_a_plane_may_differ(device: torch.device) -> None:
    a, d = normal(0, 4, 3, 5, 5).to(device), normal(1, 4, 4, 5, 5).to(device)
    moments = gradient_moments(a, d, convolution=Convolution((2, 2)), maps=True)
    padded = F.pad(a, (0, 1, 0, 1))
    assert_holds(moments, convolution_gradients(padded, d, Convolution((2, 2)), 4))


def problems(device: torch.device) -> list[MomentProblem]:
    """Weights of every path: aligned, narrow, odd, windows, float64, tied."""
    supernet = normal(0, 4, 5, 80).to(device)
    found = []
    for n, (out, width, dtype, groups) in enumerate(
        [(40, 24, BF16, 4), (8, 64, BF16, 2), (20, 12, BF16, 4), (7, 9, BF16, 4), (40, 24, FP32, 2), (36, 72, FP32, 4)]
    ):
        d = normal(n + 1, 4, 5, out).to(device, dtype)
        found.append(MomentProblem(supernet.to(dtype)[..., :width], d, groups))
    image, grads = normal(20, 4, 3, 5, 5).to(device), normal(21, 4, 6, 5, 5).to(device)
    found.append(MomentProblem(image, grads, 4, Convolution((3, 3), padding=(1, 1))))
    found.append(MomentProblem([supernet] * 2, [normal(n, 4, 5, 8).to(device) for n in (22, 23)]))
    return found


def test_a_problem_has_the_same_bits_whatever_shares_its_launch(device: torch.device) -> None:
    together = problems(device)
    alone = [gradient_moments_grouped([p])[0] for p in together]
    assert gradient_moments_grouped(together) == alone
    assert gradient_moments_grouped(together[::-1]) == alone[::-1]
    pairs = [together[n] for n in (0, 3, 0, 6)]
    pending = launch_gradient_moments(pairs)
    assert pending.finish() == pending.finish() == [alone[n] for n in (0, 3, 0, 6)]


def test_a_layout_seen_before_is_not_worked_out_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from lswag_fast.ops import gradient_moments_grouped as grouped

    monkeypatch.setattr(grouped, "_KINDS", {})
    first = [gradient_moments_grouped([p])[0] for p in problems(device)]
    kinds = len(grouped._KINDS)
    assert kinds == len(first)
    with monkeypatch.context() as patch:
        patch.setattr(grouped, "checked", None)
        assert gradient_moments_grouped(problems(device)) == first
        # Other values, and another order of them.
        doubled = [MomentProblem(p.inputs, _doubled(p.output_grads), p.groups, p.convolution) for p in problems(device)]
        for twice, once in zip(gradient_moments_grouped(doubled[::-1])[::-1], first, strict=True):
            assert twice.mean_sigma == 2 * once.mean_sigma
    assert len(grouped._KINDS) == kinds
    # What differs in anything that a kernel looks at is another layout.
    a, d = normal(0, 4, 5, 64).to(device, BF16), normal(1, 4, 5, 48).to(device, BF16)
    moved = MomentProblem(a[..., 4:36], d[..., :32], 4)
    aligned = MomentProblem(a[..., :32], d[..., :32], 4)
    for problem in (aligned, moved, MomentProblem(a[..., :32], d[..., :32], 2), MomentProblem([a, a], [d, d], 4)):
        gradient_moments_grouped([problem])
    assert len(grouped._KINDS) == kinds + 4
    with pytest.raises(InputError, match="divide S, got 3"):
        launch_gradient_moments([MomentProblem(a, d, 3)])
    monkeypatch.setattr(grouped, "_MOST_KINDS", kinds + 4)
    gradient_moments_grouped([MomentProblem(a[:, 1:], d[:, 1:], 4)])
    assert len(grouped._KINDS) == 1


def _doubled(output_grads: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    return 2 * output_grads if isinstance(output_grads, Tensor) else [2 * d for d in output_grads]


def test_the_cpu_kernels_take_the_same_problems(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_moments = gradient_moments_grouped(problems(device))
    monkeypatch.setenv("LSWAG_BACKEND", "cpp")
    cpp_moments = gradient_moments_grouped(problems(torch.device("cpu")))
    for ours, wanted in zip(triton_moments, cpp_moments, strict=True):
        assert ours.log_sum_inverse_sigma == pytest.approx(wanted.log_sum_inverse_sigma, abs=1e-4)
        assert ours.dead == wanted.dead
    assert gradient_moments_grouped([]) == []


def test_tf32_is_asked_for(device: torch.device) -> None:
    a, d = normal(0, 8, 17, 40).to(device), normal(1, 8, 17, 24).to(device)
    (moments,) = gradient_moments_grouped([MomentProblem(a, d, tf32=True)])
    expected = reference.moments_of(linear_gradients([a], [d], 8))
    assert moments.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=2e-2)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("architecture", [80, 90])
def test_memory_beside_the_operands_is_small_for_any_layer(architecture: int, signed: bool) -> None:
    pytest.importorskip("triton")
    from lswag_fast.kernels.gradient_moments_launch import Placed, workspace_bytes
    from lswag_fast.kernels.gradient_moments_layout import Weight, layout_of

    # One element stands for all: shapes and strides are looked at, nothing is launched.
    element = torch.zeros(1, dtype=torch.float32)
    for out, width, groups, kernel in [
        (640, 2560, 64, 1),
        (50304, 12288, 2, 1),
        (23168, 23168, 2, 1) if signed else (46336, 46336, 2, 1),
        (4096, 512, 2, 7),
    ]:
        a, d = (element.expand(64, channels, 8, 8) for channels in (width, out))
        layout = layout_of(Weight([a], [d], groups, (kernel, kernel), signed=signed), architecture)
        assert workspace_bytes([Placed(layout, [a, d])]) < 64 * 2**20
    huge = element.expand(64, 46336, 8, 8)
    with pytest.raises(InputError, match=r"whose sums of tiles fit 60 MiB, got \[46336, 46336\] with signed = True"):
        layout_of(Weight([huge], [huge], 2, signed=True), architecture)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, r"divide S, got 3"),
        ({"inputs": torch.ones(8, 3, 4, dtype=torch.int64)}, r"got int64"),
        ({"output_grads": torch.ones(8, 3, 4, device="meta")}, r"got a tensor on meta"),
        ({"inputs": torch.ones(8, 3, 4, device="meta")}, r"a CUDA device, got a tensor on meta"),
    ],
)
def test_bad_input_is_refused(device: torch.device, options: dict[str, object], message: str) -> None:
    operands: dict[str, object] = {"inputs": torch.ones(8, 3, 4), "output_grads": torch.ones(8, 3, 4)} | options
    placed = {k: v.to(device) if isinstance(v, Tensor) and v.device.type == "cpu" else v for k, v in operands.items()}
    with pytest.raises(InputError, match=message):
        gradient_moments(**placed)  # type: ignore[arg-type]


def test_samples_beyond_32_bit_offsets_are_refused() -> None:
    pytest.importorskip("triton")
    from lswag_fast.kernels.gradient_moments_layout import Weight, layout_of

    near, far = (torch.empty_strided((8, 4, 1, 3), (0, 1, 1, s), device="meta") for s in (2**20, 2**25))
    wide = torch.empty(1, device="meta").expand(8, 2**16, 1, 3)
    with pytest.raises(InputError, match=r"inputs whose samples span fewer than 2\^31 elements"):
        layout_of(Weight([far], [near], 8), 90)
    with pytest.raises(InputError, match=r"a weight of fewer than 2\^31 elements"):
        layout_of(Weight([wide], [wide], 8), 90)


def test_a_device_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from lswag_fast.kernels import gradient_moments_launch as launcher

    monkeypatch.setattr(launcher, "_device_facts", lambda device: (75, 40))
    with pytest.raises(InputError, match=r"compute capability 8\.0 or newer, got 7\.5 \(cuda:1\); move them"):
        launcher.architecture_of(torch.device("cuda", 1))
    monkeypatch.setattr(launcher, "_device_facts", lambda device: (86, 40))
    assert launcher.architecture_of(torch.device("cuda", 1)) == 86


def test_problems_on_several_devices_are_refused(device: torch.device) -> None:
    here, there = torch.ones(4, 3, 2, device=device), torch.ones(4, 3, 2, device="meta")
    with pytest.raises(InputError, match="CUDA device, got a tensor on meta"):
        launch_gradient_moments([MomentProblem(here, here), MomentProblem(there, there)])
