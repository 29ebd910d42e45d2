"""The gradient of GELU and of the other activations whose signs are counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import backends
from ..errors import InputError
from ..memory import Empty

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_aten = torch.ops.aten
_TORCH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, saved: _aten.threshold_backward(grad, saved, 0),
    "relu6": lambda grad, saved: _aten.hardtanh_backward(grad, saved, 0.0, 6.0),
    "gelu": lambda grad, saved: _aten.gelu_backward(grad, saved),
    "gelu_tanh": lambda grad, saved: _aten.gelu_backward(grad, saved, approximate="tanh"),
    "silu": lambda grad, saved: _aten.silu_backward(grad, saved),
    "hardswish": lambda grad, saved: _aten.hardswish_backward(grad, saved),
}


def activation_backward(
    grad: Tensor,  # [...]
    saved: Tensor,  # [...]
    kind: str,
    *,
    empty: Empty = torch.empty,
) -> Tensor:  # [...]
    """Returns the gradient at the input of an activation: `grad` times its derivative there.

    Args:
        grad: The gradient at its output. Float32, bfloat16 and float16 on a CUDA device run in one pass, in float32;
            all others by torch.
        saved: Its input, of the shape, dtype and device of `grad`; of relu its output will do.
        kind: relu, relu6, gelu (by the error function), gelu_tanh, silu or hardswish.
        empty: Where the kernel, if it runs, puts the result.

    Returns:
        The gradient, in the dtype of `grad`.

    Raises:
        InputError: An unknown kind; tensors that do not fit each other.

    Source: Hendrycks, Gimpel, Gaussian Error Linear Units, arXiv 1606.08415.
    """
    if kind not in _TORCH:
        raise InputError(f"kind must be one of {', '.join(_TORCH)}, got {kind!r}")
    given = [(tuple(t.shape), t.dtype, t.device) for t in (grad, saved)]
    if given[0] != given[1] or not saved.is_floating_point():
        raise InputError(
            f"expected grad and saved of one shape, floating dtype and device, "
            f"got {grad.dtype} {list(grad.shape)} on {grad.device} and "
            f"{saved.dtype} {list(saved.shape)} on {saved.device}"
        )
    if saved.dtype not in _KERNEL_DTYPES or backends.implementation("gelu", saved.device.type) != "triton":
        return _TORCH[kind](grad, saved)
    from ..kernels import gelu

    if not (saved.is_contiguous() or (saved.dim() == 4 and saved.is_contiguous(memory_format=torch.channels_last))):
        saved = saved.contiguous()
    if grad.stride() != saved.stride():
        grad = torch.empty_like(saved).copy_(grad)
    return gelu.backward(grad, saved, kind, empty)
