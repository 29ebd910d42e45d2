"""What gradient_moments refuses, and what it takes inputs and output gradients for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .arrays import as_tensor
from .moments import Convolution

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIMS = 8
_MOST_WEIGHTS = 2**40


def checked(
    inputs: Any, output_grads: Any, groups: int | None, convolution: Convolution | None
) -> tuple[list[Tensor], list[Tensor], int, tuple[int, ...]]:
    """Returns inputs and output_grads as lists of tensors, the number of groups and the shape of the weight."""
    a, d = listed("inputs", inputs), listed("output_grads", output_grads)
    _check_devices(a, d)
    samples = _checked_samples(a, d)
    count = samples if groups is None else groups
    if count < 2 or samples % count:
        raise InputError(f"expected groups from 2 to S = {samples} that divide S, got {count}")
    shape = _linear_shape(a, d) if convolution is None else _convolution_shape(a, d, convolution)
    return a, d, count, shape


def _check_devices(a: list[Tensor], d: list[Tensor]) -> None:
    device = a[0].device
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"expected inputs on the CPU or a CUDA device, got a tensor on {device}; move it with .cpu()")
    for name, tensors in (("inputs", a), ("output_grads", d)):
        for tensor in tensors:
            if tensor.device != device:
                place = "the CPU" if device.type == "cpu" else str(device)
                raise InputError(
                    f"expected {name} on {place} as inputs are, got a tensor on {tensor.device}; "
                    f"move it with .to({str(device)!r})"
                )


def listed(name: str, given: Any) -> list[Tensor]:
    """Returns one tensor or several as a list, of the accepted dtypes."""
    tensors = list(given) if isinstance(given, (list, tuple)) else [given]
    if not tensors:
        raise InputError(f"expected {name} of one use of the weight or more, got an empty sequence")
    return [accepted_tensor(name, t, DTYPES) for t in tensors]


def checked_weight(given: Any, shape: tuple[int, ...], signed: bool, device: torch.device) -> Tensor:
    """Returns the weight of operands on `device`, whose signed moments are asked for, as a tensor of its `shape`."""
    weight = accepted_tensor("weight", given, DTYPES)
    if tuple(weight.shape) != shape:
        raise InputError(f"expected weight of shape {list(shape)}, got {list(weight.shape)}")
    if not signed:
        raise InputError("weight needs the signed moments; pass signed=True")
    if weight.device != device:
        raise InputError(f"expected weight on {device} as inputs are, got {weight.device}")
    return weight


def accepted_tensor(name: str, given: Any, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Returns `given` as a tensor that is not empty; raises InputError where it has none of the dtypes."""
    tensor = as_tensor(given, name)
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"expected {name} in one of {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.numel() == 0:
        raise InputError(f"expected {name} without an empty dimension, got shape {list(tensor.shape)}")
    return tensor


def _checked_samples(a: list[Tensor], d: list[Tensor]) -> int:
    if len(a) != len(d):
        raise InputError(f"expected output_grads for each of {len(a)} uses of inputs, got {len(d)}")
    samples = a[0].shape[0] if a[0].ndim else 0
    for name, tensors in (("inputs", a), ("output_grads", d)):
        for tensor in tensors:
            if not 2 <= tensor.ndim <= _MAX_DIMS:
                raise InputError(f"expected {name} [S, T, C] of 2 to {_MAX_DIMS} dimensions, got {list(tensor.shape)}")
            if tensor.shape[0] != samples:
                raise InputError(
                    f"expected {name} [S, ...] with the S of inputs ({samples}), got S = {tensor.shape[0]}"
                )
    return samples


def _linear_shape(a: list[Tensor], d: list[Tensor]) -> tuple[int, int]:
    shape = (d[0].shape[-1], a[0].shape[-1])
    for u in range(len(a)):
        if a[u].shape[:-1] != d[u].shape[:-1]:
            raise InputError(
                f"expected output_grads [S, T, O] with the S, T of inputs {list(a[u].shape[:-1])}, "
                f"got {list(d[u].shape[:-1])}"
            )
        if (d[u].shape[-1], a[u].shape[-1]) != shape:
            raise InputError(
                f"expected every use with the weight [O, I] of the first {list(shape)}, "
                f"got {[d[u].shape[-1], a[u].shape[-1]]}"
            )
        if a[u].ndim == 2:
            a[u], d[u] = a[u].unsqueeze(1), d[u].unsqueeze(1)
    return shape


def _convolution_shape(a: list[Tensor], d: list[Tensor], convolution: Convolution) -> tuple[int, int, int, int]:
    positive = (*convolution.kernel_size, *convolution.stride, *convolution.dilation, convolution.groups)
    if min(positive) < 1 or min(convolution.padding) < 0:
        raise InputError(f"expected kernel, stride, dilation and groups from 1 and padding from 0, got {convolution}")
    for name, tensors in (("inputs [S, C, H, W]", a), ("output_grads [S, O, OH, OW]", d)):
        for tensor in tensors:
            if tensor.ndim != 4:
                raise InputError(f"expected {name} with convolution, got {list(tensor.shape)}")
            if tensor.shape[1] % convolution.groups or tensor.shape[1] != tensors[0].shape[1]:
                raise InputError(
                    f"expected {name} with {tensors[0].shape[1]} channels divisible by groups = "
                    f"{convolution.groups}, got {tensor.shape[1]}"
                )
    for tensor in d:
        _check_reach(convolution, tensor)
    shape = (d[0].shape[1], a[0].shape[1] // convolution.groups, *convolution.kernel_size)
    if math.prod(shape) >= _MOST_WEIGHTS:
        raise InputError(f"expected a kernel of fewer than 2^40 weights, got {list(shape)}")
    return shape


def _check_reach(convolution: Convolution, output_grads: Tensor) -> None:
    """Refuses windows whose positions, counted in 32 bits, run past 2^31 along an axis or in the plane."""
    c = convolution
    spans = [
        stride * (out - 1) + dilation * (kernel - 1) + 1
        for out, stride, kernel, dilation in zip(
            output_grads.shape[2:], c.stride, c.kernel_size, c.dilation, strict=True
        )
    ]
    ends = [span + pad for span, pad in zip(spans, c.padding, strict=True)]
    if max(*ends, math.prod(spans)) >= 2**31:
        raise InputError(
            f"expected windows that reach over fewer than 2^31 positions of the padded plane, got {spans} with padding "
            f"{list(c.padding)} for outputs {list(output_grads.shape[2:])}"
        )
