"""The saliency of channels: outputs of a layer against the gradients there."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C, backends
from ..errors import InputError
from .arrays import refusals

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def channel_saliency(
    outputs: Tensor,  # [S, ...]
    output_grads: Tensor,  # [S, ...]
    channel_axis: int = -1,
) -> Tensor:  # []
    """Returns sum over samples n and channels c of (sum over positions of y * d)^2, the term of Fisher.

    Floor: one pass over both operands. C++ on the CPU reads each once and stores [S, C]; elsewhere torch does it.
    Products are float32, few of them are summed so, and the rest is float64.

    Args:
        outputs: y, floating, any strides; C++ takes float32, bfloat16 and float16.
        output_grads: d, of the shape and dtype of y and on its device.
        channel_axis: that of the channels, not 0; every other but 0 is one of positions.

    Returns:
        float64, on the device of y.

    Raises:
        InputError: operands that do not fit each other, or `channel_axis` is none of theirs.

    Source: Turner, Crowley, O'Boyle, Storkey, Gray, ICLR 2020.
    """
    _check(outputs, output_grads, channel_axis)
    y, d = (
        t.detach().movedim(channel_axis, -1).flatten(1, -2) if t.dim() > 2 else t.detach().unsqueeze(1)
        for t in (outputs, output_grads)
    )
    if backends.implementation("channel_saliency", y.device.type) != "cpp" or y.dtype not in _DTYPES:
        channels = (y.float() * d.float()).sum(1)
        return channels.square().sum(dtype=torch.float64)
    sums = torch.empty(len(y), y.shape[2], dtype=torch.float64)
    with refusals():
        _C.channel_saliency(y, d, sums, torch.get_num_threads())
    return sums.square().sum()


def _check(outputs: Tensor, output_grads: Tensor, channel_axis: int) -> None:
    given = [(tuple(t.shape), t.dtype, t.device) for t in (outputs, output_grads)]
    if given[0] != given[1] or not outputs.is_floating_point() or outputs.dim() < 2:
        raise InputError(
            f"expected outputs and output_grads [S, ...] of one shape, floating dtype and device, "
            f"got {outputs.dtype} {list(outputs.shape)} on {outputs.device} and "
            f"{output_grads.dtype} {list(output_grads.shape)} on {output_grads.device}"
        )
    if not -outputs.dim() <= channel_axis < outputs.dim() or channel_axis % outputs.dim() == 0:
        raise InputError(
            f"expected a channel_axis of outputs {list(outputs.shape)} other than the samples', got {channel_axis}"
        )
