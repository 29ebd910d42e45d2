from __future__ import annotations

import pytest
import torch
from gradients import DTYPES, assert_few_groups_hold, assert_holds, convolution_gradients, normal, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lswag_fast import reference
from lswag_fast.ops.gradient_moments import Convolution, gradient_moments


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Convolution, int]:
    groups = draw(st.integers(2, 4))
    samples = groups * draw(st.integers(1, 2))
    channel_groups = draw(st.sampled_from([1, 2, 19]))
    depthwise = channel_groups == 19 and draw(st.booleans())
    widths = st.just(1) if depthwise else st.sampled_from([1, 2, 5])
    in_channels, out_channels = (channel_groups * draw(widths) for _ in range(2))
    pairs = {
        name: (draw(st.integers(low, high)), draw(st.integers(low, high)))
        for name, low, high in (("kernel_size", 1, 4), ("stride", 1, 3), ("padding", 0, 2), ("dilation", 1, 2))
    }
    convolution = Convolution(**pairs, groups=channel_groups)
    plane = [
        draw(st.integers((k - 1) * r + 1, 13)) for k, r in zip(pairs["kernel_size"], pairs["dilation"], strict=True)
    ]
    # The end of the plane may be padded otherwise than its beginning.
    end = draw(st.integers(0, 2))
    out = [
        (size + pad + end - (k - 1) * r - 1) // s + 1
        for size, pad, k, r, s in zip(
            plane, pairs["padding"], pairs["kernel_size"], pairs["dilation"], pairs["stride"], strict=True
        )
    ]
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**20))
    a = normal(seed, samples, in_channels, *plane).to(dtype)
    d = normal(seed + 1, samples, out_channels, *out).to(dtype)
    if draw(st.booleans()):
        a = a.to(memory_format=torch.channels_last)
    if draw(st.booleans()):
        d = d.to(memory_format=torch.channels_last)
    return a, d, convolution, groups


@settings(max_examples=min(60, settings().max_examples))
@given(convolutions())
def test_convolutions_hold_to_autograd(layer: tuple[Tensor, Tensor, Convolution, int]) -> None:
    inputs, output_grads, convolution, groups = layer
    moments = gradient_moments(inputs, output_grads, groups, convolution=convolution, maps=True)
    assert_holds(moments, convolution_gradients(inputs, output_grads, convolution, groups))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("convolution", "in_channels", "out_channels", "size"),
    [
        (Convolution((16, 16), stride=(16, 16)), 3, 24, 48),
        (Convolution((7, 7), padding=(3, 3), groups=40), 40, 40, 20),
        (Convolution((3, 5), (2, 1), padding=(2, 6), dilation=(2, 3), groups=20), 20, 20, 18),
        (Convolution((3, 3), padding=(1, 1)), 32, 20, 18),
        (Convolution((1, 1)), 64, 48, 6),
    ],
)
def test_the_convolutions_of_vision_models(
    convolution: Convolution, in_channels: int, out_channels: int, size: int, channels_last: bool
) -> None:
    out = [size // stride for stride in convolution.stride]
    a, d = normal(0, 4, in_channels, size, size), normal(1, 4, out_channels, *out)
    if channels_last:
        a, d = (t.to(memory_format=torch.channels_last) for t in (a, d))
    moments = gradient_moments(a, d, convolution=convolution, maps=True)
    assert_holds(moments, convolution_gradients(a, d, convolution, 4))


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        ((torch.float32, torch.float32), 1e-5),
        ((torch.float16, torch.float16), 1e-5),
        ((torch.bfloat16, torch.float32), 1e-5),
        ((torch.bfloat16, torch.bfloat16), 2e-2),
    ],
)
def test_few_groups_hold_weight_by_weight(
    dtypes: tuple[torch.dtype, torch.dtype], tolerance: float, groups: int
) -> None:
    convolution = Convolution((7, 7), padding=(3, 3), groups=64)
    a, d = (normal(n, 12, 64, 28, 28).to(dtype) for n, dtype in enumerate(dtypes))
    moments = gradient_moments(a, d, groups, convolution=convolution, signed=True, maps=True)
    assert_few_groups_hold(moments, convolution_gradients(a, d, convolution, groups), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channel_groups", [1, 20])
def test_sums_of_biased_terms_hold(channel_groups: int, dtype: torch.dtype) -> None:
    """Inputs after a ReLU: rounding errors of a chain of sums of one sign grow with its length."""
    channels = 3 if channel_groups == 1 else channel_groups
    a = uniform(0, 16, channels, 56, 56).to(dtype)
    d = (normal(1, 16, channels, 56, 56) + 1).to(dtype)
    convolution = Convolution((3, 3), padding=(1, 1), groups=channel_groups)
    expected = reference.moments_of(convolution_gradients(a, d, convolution, 4).groups)
    moments = gradient_moments(a, d, 4, convolution=convolution)
    assert moments.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=1e-5)


def test_padding_may_exceed_the_kernel() -> None:
    a, d = normal(0, 4, 2, 5, 6), normal(1, 4, 3, 13, 14)
    convolution = Convolution((1, 1), padding=(4, 4))
    moments = gradient_moments(a, d, convolution=convolution, maps=True)
    assert_holds(moments, convolution_gradients(a, d, convolution, 4))
