from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients import (
    DTYPES,
    NOT_FINITE,
    assert_few_groups_hold,
    assert_holds,
    assert_nan,
    linear_gradients,
    normal,
    ones,
    uniform,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lswag_fast import _C, reference
from lswag_fast.errors import InputError
from lswag_fast.ops.gradient_moments import Convolution, gradient_moments


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Returns the values of [S, T, C] as a view with other strides."""
    samples, tokens, channels = tensor.shape
    if layout == "sequence first":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels apart":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice":
        wide = torch.full((samples, tokens + 2, channels + 3), math.nan, dtype=tensor.dtype)
        wide[:, 1:-1, 2:-1] = tensor
        return wide[:, 1:-1, 2:-1]
    return tensor.contiguous()


LAYOUTS = ("contiguous", "sequence first", "channels apart", "slice")


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], int]:
    groups = draw(st.integers(2, 6))
    samples = groups * draw(st.integers(1, 3))
    uses = draw(st.integers(1, 2))
    in_width, out_width = draw(st.integers(1, 120)), draw(st.integers(1, 40))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(2)]
    seed = draw(st.integers(0, 2**20))
    inputs, output_grads = [], []
    for u in range(uses):
        tokens = draw(st.sampled_from([1, 2, 5, 17, 140, 263]))
        a, d = normal(seed + 2 * u, samples, tokens, in_width), normal(seed + 2 * u + 1, samples, tokens, out_width)
        inputs.append(laid_out(a.to(dtypes[0]), draw(st.sampled_from(LAYOUTS))))
        output_grads.append(laid_out((d / 64).to(dtypes[1]), draw(st.sampled_from(LAYOUTS))))
    return inputs, output_grads, groups


@settings(max_examples=min(40, settings().max_examples))
@given(layers())
def test_linear_layers_hold_to_the_definition(layer: tuple[list[Tensor], list[Tensor], int]) -> None:
    inputs, output_grads, groups = layer
    moments = gradient_moments(inputs, output_grads, groups, maps=True)
    assert_holds(moments, linear_gradients(inputs, output_grads, groups))


FEW = [
    ((torch.float32, torch.float32), 1e-5),
    ((torch.float16, torch.float16), 1e-5),
    ((torch.bfloat16, torch.float32), 1e-5),
    ((torch.bfloat16, torch.bfloat16), 2e-2),
]


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize(("dtypes", "tolerance"), FEW)
@pytest.mark.parametrize("uses", [1, 2])
def test_few_groups_hold_weight_by_weight(
    uses: int, dtypes: tuple[torch.dtype, torch.dtype], tolerance: float, groups: int
) -> None:
    """Where a weight's gradients nearly cancel in every group, its sigma hangs on the last bits of the sums."""
    a = [normal(n, 6, 197, 216).to(dtypes[0]) for n in range(uses)]
    d = [normal(9 + n, 6, 197, 128).to(dtypes[1]) for n in range(uses)]
    moments = gradient_moments(a, d, groups, signed=True, maps=True)
    assert_few_groups_hold(moments, linear_gradients(a, d, groups), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
@pytest.mark.parametrize(
    ("samples", "tokens", "in_width", "out_width", "groups"),
    [(16, 3136, 9, 8, 4), (64, 1024, 1, 4, 4), (16, 256, 1, 4, 4), (64, 256, 3, 4, 64)],
)
def test_sums_of_biased_terms_hold(
    samples: int, tokens: int, in_width: int, out_width: int, groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Inputs after a ReLU: rounding errors of a chain of sums of one sign grow with its length."""
    a = uniform(0, samples, tokens, in_width).to(dtype)
    d = (normal(1, samples, tokens, out_width) + 1).to(dtype)
    expected = reference.moments_of(linear_gradients([a], [d], groups).groups)
    moments = gradient_moments(a, d, groups)
    assert moments.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=tolerance)


def test_one_group_a_sample_is_the_default() -> None:
    a, d = normal(0, 6, 5, 9), normal(1, 6, 5, 4)
    assert gradient_moments(a, d) == gradient_moments(a, d, 6)


def test_tokens_may_span_several_dimensions_that_cannot_be_merged() -> None:
    a = normal(0, 4, 6, 8, 10, 7).permute(0, 3, 1, 2, 4)[:, :, ::2]
    d = normal(1, 4, 10, 3, 8, 5)
    moments = gradient_moments(a, d, maps=True)
    assert_holds(moments, linear_gradients([a], [d], 4))


def test_a_tensor_without_token_dimension_is_one_token() -> None:
    a, d = normal(0, 8, 30), normal(1, 8, 20)
    assert gradient_moments(a, d, 4) == gradient_moments(a.unsqueeze(1), d.unsqueeze(1), 4)


def test_lazily_negated_and_reversed_arrays_are_read() -> None:
    a, d = normal(0, 4, 3, 10), normal(1, 4, 3, 6)
    expected = gradient_moments(a, -d)
    assert gradient_moments(a, torch._neg_view(d)) == expected
    assert gradient_moments(a.flip(1).numpy()[:, ::-1], -d.flip(1).numpy()[:, ::-1]) == expected
    frozen = a.numpy()
    frozen.flags.writeable = False
    assert gradient_moments(frozen, -d) == expected


def test_numpy_arrays_and_tensors_that_require_gradients_are_read() -> None:
    a, d = normal(0, 4, 3, 10), normal(1, 4, 3, 6)
    expected = gradient_moments(a, d)
    assert gradient_moments(a.numpy(), d.numpy()) == expected
    assert gradient_moments([a.requires_grad_()], (d.requires_grad_(),)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 31, 600])
def test_equal_magnitudes_are_exactly_dead(dtype: torch.dtype, tokens: int) -> None:
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    a = normal(0, 1, tokens, 70).expand(5, -1, -1).to(dtype)
    d = (normal(1, 1, tokens, 11) * signs.view(-1, 1, 1)).to(dtype)
    moments = gradient_moments(a, d, maps=True)
    assert moments.dead == moments.numel == 770
    assert moments.log_sum_inverse_sigma is None
    assert moments.log_sum_mean_over_sigma is None
    assert moments.mean_sigma == 0
    assert moments.mean_abs_gradient > 0
    assert moments.maps is not None
    assert not moments.maps.sigma.any()


def test_dead_rows_and_columns_are_counted_and_left_out() -> None:
    a, d = normal(0, 8, 21, 60), normal(1, 8, 21, 20)
    a[:, :, 7] = 0
    d[:, :, 3] = 0
    moments = gradient_moments(a, d, maps=True)
    assert moments.dead == 60 + 20 - 1
    assert_holds(moments, linear_gradients([a], [d], 8))


def test_one_live_weight_among_dead_ones_is_found() -> None:
    a, d = torch.zeros(4, 2, 50), torch.zeros(4, 2, 30)
    a[:, 0, 49] = torch.tensor([1.0, 2.0, 3.0, 5.0])
    d[:, 0, 29] = 1e-25
    moments = gradient_moments(a, d)
    assert moments.dead == 1499
    sigma = 1e-25 * np.std([1.0, 2.0, 3.0, 5.0])
    assert moments.log_sum_inverse_sigma == pytest.approx(-math.log(sigma), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-19, 1e19, 1e37])
def test_magnitudes_neither_underflow_nor_overflow(dtype: torch.dtype, magnitude: float) -> None:
    a, d = normal(0, 8, 19, 60).to(dtype), (normal(1, 8, 19, 20) * magnitude).to(dtype)
    moments = gradient_moments(a, d, 4, maps=True)
    assert moments.dead == 0
    assert moments.mean_abs_gradient > 0
    assert_holds(moments, linear_gradients([a], [d], 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_may_differ_within_a_layer(dtype: torch.dtype) -> None:
    a = (normal(0, 8, 19, 60) * 10.0 ** -torch.linspace(0, 20, 60)).to(dtype)
    d = (normal(1, 8, 19, 20) * 10.0 ** -torch.linspace(0, 30, 20)).to(dtype)
    moments = gradient_moments(a, d, 4, maps=True)
    assert moments.dead == 0
    assert_holds(moments, linear_gradients([a], [d], 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rest", "outlier"), [(1e-20, 1e10), (0.0, 1e-30)])
def test_magnitudes_that_few_gradients_have_are_seen(dtype: torch.dtype, rest: float, outlier: float) -> None:
    a, d = normal(0, 4, 64, 50).to(dtype), normal(1, 4, 64, 40) * rest
    d[:, 62:, 37:] = normal(2, 4, 2, 3) * outlier
    moments = gradient_moments(a, d.to(dtype), maps=True)
    assert_holds(moments, linear_gradients([a], [d.to(dtype)], 4))


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("where", ["inputs", "output_grads"])
@pytest.mark.parametrize("width", [10, 48])
@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("everywhere", [False, True])
def test_gradients_that_are_not_finite_give_nan(
    everywhere: bool, dtype: torch.dtype, groups: int, width: int, where: str, value: float
) -> None:
    a, d = normal(0, 6, 3, width).to(dtype), normal(1, 6, 3, 8).to(dtype)
    samples = slice(None) if everywhere else slice(5, 6)
    (a if where == "inputs" else d)[samples, 1, 4] = value
    moments = gradient_moments(a, d, groups, signed=True)
    assert_nan(moments)
    assert moments.signed is not None
    assert math.isnan(moments.signed.mean_sigma)
    assert math.isnan(moments.signed.mean_abs_mean)
    assert math.isnan(moments.signed.mean_signal_to_noise or 0.0)


def test_subnormal_operands_keep_their_scale_where_the_processor_flushes_them() -> None:
    a, d = normal(0, 4, 5, 20), normal(1, 4, 5, 8).half() * 2.0**-3
    expected = gradient_moments(a, d)
    torch.set_flush_denormal(True)
    try:
        assert gradient_moments(a, d) == expected
    finally:
        torch.set_flush_denormal(False)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("convolution", [None, Convolution((3, 3), padding=(1, 1)), Convolution((3, 3), groups=40)])
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, convolution: Convolution | None) -> None:
    shapes = ((6, 300, 200), (6, 300, 90)) if convolution is None else ((6, 40, 9, 8), (6, 40, 7, 6))
    a, d = (normal(n, *shape).to(dtype) for n, shape in enumerate(shapes))
    results = []
    for count in (1, 2, 3, 7, 1):
        torch.set_num_threads(count)
        results.append(gradient_moments(a, d, 3, convolution=convolution, signed=True, maps=True))
    for other in results[1:]:
        assert (other.log_sum_inverse_sigma, other.mean_sigma) == (
            results[0].log_sum_inverse_sigma,
            results[0].mean_sigma,
        )
        assert other.signed == results[0].signed
        for name, tensor in vars(results[0].maps).items():
            assert torch.equal(tensor, getattr(other.maps, name))


def test_memory_does_not_grow_with_the_samples() -> None:
    def workspace(samples: int) -> int:
        a, d = torch.zeros(1, 1, 500).expand(samples, 64, -1), torch.zeros(1, 1, 400).expand(samples, 64, -1)
        return _C.GradientMoments([a], [d], samples, None, False, 2).workspace_bytes

    assert workspace(1024) == workspace(4) < 4 * 2**20


@pytest.mark.parametrize(
    ("inputs", "output_grads", "options", "message"),
    [
        (ones(64, 3, 4), ones(32, 3, 4), {}, r"output_grads \[S, \.\.\.\] with the S of inputs \(64\), got S = 32"),
        (ones(8, 3, 4), ones(8, 2, 4), {}, r"S, T of inputs \[8, 3\], got \[8, 2\]"),
        (ones(8, 3, 4), ones(8, 3, 4), {"groups": 3}, r"divide S, got 3"),
        (ones(8, 3, 4), ones(8, 3, 4), {"groups": 1}, r"groups from 2 to S = 8"),
        (ones(1, 3, 4), ones(1, 3, 4), {}, r"groups from 2 to S = 1"),
        (ones(8, 3, 4).double(), ones(8, 3, 4), {}, r"inputs in one of float32, bfloat16, float16, got float64"),
        (ones(8, 3, 4), ones(8, 3, 4).to("meta"), {}, r"output_grads on the CPU as inputs are, got a tensor on meta"),
        ([ones(8, 3, 4)] * 2, [ones(8, 3, 4)], {}, r"each of 2 uses"),
        ([ones(8, 3, 4), ones(8, 3, 5)], [ones(8, 3, 4)] * 2, {}, r"of the first \[4, 4\], got \[4, 5\]"),
        ([], [], {}, r"got an empty sequence"),
        (ones(8, 0, 4), ones(8, 0, 4), {}, r"empty dimension"),
        (ones(8), ones(8), {}, r"2 to 8 dimensions"),
        ("text", ones(8), {}, r"a DLPack array, got str"),
        (ones(8, 3, 4).to_sparse(), ones(8, 3, 4), {}, r"inputs must be a dense strided tensor, got layout sparse_coo"),
        (np.ones((8, 3, 4), ">f4"), ones(8, 3, 4), {}, r"byte order"),
        (ones(8, 3, 4), ones(8, 3, 4), {"convolution": Convolution((3, 3))}, r"inputs \[S, C, H, W\]"),
        (ones(2, 3, 4, 4), ones(2, 4, 2, 2), {"convolution": Convolution((3, 3), groups=2)}, r"by groups = 2"),
        (ones(2, 2, 4, 4), ones(2, 2, 2, 2), {"convolution": Convolution((3, 3), stride=(0, 1))}, r"stride"),
        (ones(2, 2, 4, 4), ones(2, 2, 2, 2), {"convolution": Convolution((3, 3), stride=(2**31, 1))}, r"2\^31"),
        (ones(2, 2, 4, 4), ones(2, 2, 2, 2), {"convolution": Convolution((3, 3), padding=(0, 2**31))}, r"2\^31"),
        (ones(2, 2, 4, 4), ones(2, 2, 2, 2), {"convolution": Convolution((3, 3), dilation=(2**30, 1))}, r"2\^31"),
        (ones(2, 2, 4, 4), ones(2, 2, 2, 2), {"convolution": Convolution((2**16, 2**16))}, r"2\^31"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(inputs: object, output_grads: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gradient_moments(inputs, output_grads, **options)  # type: ignore[arg-type]


def test_fake_tensors_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a, d = torch.empty(4, 3, 8), torch.empty(4, 3, 8)
        with pytest.raises(InputError):
            gradient_moments(a, d)


def test_the_module_checks_what_it_is_given() -> None:
    a = ones(4, 3, 8)
    for inputs, output_grads, groups in (([a.double()], [a], 4), ([a.long()], [a], 4), ([a], [], 4), ([a], [a], 3)):
        with pytest.raises(ValueError, match="expected"):
            _C.GradientMoments(inputs, output_grads, groups, None, False, 1)


@pytest.mark.parametrize("path", [path for path in _C.cpu_paths() if path != _C.cpu_path()])
def test_every_instruction_set_gives_the_same(path: str) -> None:
    environment = {**os.environ, "LSWAG_CPU": path, "LSWAG_TEST_PROFILE": "sanitize", "OMP_NUM_THREADS": "1"}
    others = ("test_convolution_moments.py", "test_moments_accumulator.py", "test_signed_moments.py")
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in others)]
    wanted = (
        "hold_to or hold_weight or biased or finite or dead or magnitudes or signed or threads or vision or one_by_one"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", wanted]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


class Once:
    """An array that can be taken once, as a stream's can."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        tensor, self.tensor = self.tensor, None
        if tensor is None:
            raise BufferError("it has been taken")
        return tensor.__dlpack__(**options)


def test_every_array_is_taken_once() -> None:
    a, d, weight = normal(0, 4, 3, 10), normal(1, 4, 3, 6), normal(2, 6, 10)
    expected = gradient_moments(a, d, signed=True, weight=weight)
    assert gradient_moments(Once(a), [Once(d)], signed=True, weight=Once(weight)) == expected  # type: ignore[arg-type, list-item]
