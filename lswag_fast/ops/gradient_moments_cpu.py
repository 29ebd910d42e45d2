"""Moments of the gradients of one weight by C++, on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _C
from .arrays import refusals
from .moments import Convolution, GradientMoments, reduced


def moments_on_cpu(
    inputs: list[Tensor],
    output_grads: list[Tensor],
    groups: int,
    shape: tuple[int, ...],
    convolution: Convolution | None,
    *,
    signed: bool,
    maps: bool,
    weight: Tensor | None = None,
) -> GradientMoments:
    """Returns what `gradient_moments` does, of arguments that have been checked; `shape` is that of the weight.

    Raises InputError for tensors that have no memory.
    """
    with refusals():
        native = _C.GradientMoments(inputs, output_grads, groups, _values(convolution), signed, torch.get_num_threads())
    workspace = torch.empty(native.workspace_bytes, dtype=torch.uint8)
    numel = math.prod(shape)
    flat = empty_maps(numel, signed, maps)
    if weight is not None:
        weight = _in_kernel_order(weight, native)
    sums, exponent = native.run(workspace, flat, weight)
    shaped = [_in_weight_order(m, shape, native) for m in flat]
    group_size = len(inputs[0]) // groups
    return reduced(sums, exponent, group_size, numel, groups, signed, shaped, with_weight=weight is not None)


def _values(convolution: Convolution | None) -> tuple[int, ...] | None:
    if convolution is None:
        return None
    c = convolution
    return (*c.kernel_size, *c.stride, *c.padding, *c.dilation, c.groups)


def empty_maps(numel: int, signed: bool, wanted: bool) -> list[Tensor]:
    """Returns memory for the maps of a weight where they are wanted: float64 [numel], in the order of MomentMaps."""
    count = (5 if signed else 2) if wanted else 0
    return [torch.empty(numel, dtype=torch.float64) for _ in range(count)]


def _in_weight_order(flat: Tensor, shape: tuple[int, ...], native: _C.GradientMoments) -> Tensor:
    if native.depthwise:
        return flat.view(*shape[2:], *shape[:2]).permute(2, 3, 0, 1).contiguous()
    if native.taps_first:
        return flat.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2).contiguous()
    return flat.view(shape)


def _in_kernel_order(weight: Tensor, native: _C.GradientMoments) -> Tensor:
    """Returns the weight as the rows and columns of the kernel's maps, columns adjacent; a view where that can be."""
    if native.depthwise:
        weight = weight.permute(2, 3, 0, 1).flatten(2).flatten(0, 1)
    elif native.taps_first:
        weight = weight.permute(0, 2, 3, 1)
    rows = weight.flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()
