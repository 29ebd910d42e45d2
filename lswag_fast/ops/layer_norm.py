"""LayerNorm over the last axis, alone or of a sum."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import backends
from ..errors import InputError
from ..memory import Empty

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_COLUMNS = 8192


def layer_norm(
    x: Tensor,  # [..., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    eps: float = 1e-5,
) -> Tensor:  # [..., C]
    """Normalises each row of C numbers: `(x - mean) / sqrt(variance + eps) * weight + bias`, population variance.

    Args:
        x: Float32, bfloat16 and float16 on a CUDA device run fused, with float32 statistics; all others by torch.
        weight: Of the dtype and device of `x`; 1 where None.
        bias: The same; 0 where None.
        eps: Added to the variance.

    Returns:
        The normalised rows, in the dtype of `x`; differentiable, once where fused. Same input, same bits.

    Raises:
        InputError: Shapes, devices or dtypes that do not fit each other.

    Source: Ba, Kiros, Hinton, Layer Normalization, arXiv 1607.06450.
    """
    _check(x, None, weight, bias)
    if not _fused(x):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    normalised: Tensor = _LayerNorm.apply(x, None, weight, bias, eps)  # type: ignore[no-untyped-call]
    return normalised


def add_layer_norm(
    x: Tensor,  # [..., C]
    residual: Tensor,  # [..., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # [..., C] both
    """Returns `total = x + residual` and `layer_norm(total, weight, bias)`, where fused in one pass over memory.

    `total` is rounded to the dtype of `x` before it is normalised. Arguments, dtypes and errors as `layer_norm`;
    `residual` has the shape, dtype and device of `x`.
    """
    _check(x, residual, weight, bias)
    if not _fused(x):
        total = x + residual
        return total, F.layer_norm(total, x.shape[-1:], weight, bias, eps)
    both: tuple[Tensor, Tensor] = _LayerNorm.apply(x, residual, weight, bias, eps)  # type: ignore[no-untyped-call]
    return both


@dataclass(frozen=True)
class NormalisedSum:
    """The LayerNorm of a sum [..., C], with what its gradient needs; no graph is kept."""

    total: Tensor
    normalised: Tensor
    _weight: Tensor
    _statistics: tuple[Tensor, ...]  # of the kernel, or mean and reciprocal deviation of torch

    @staticmethod
    def of(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        *,
        eps: float = 1e-5,
        empty: Empty = torch.empty,
    ) -> NormalisedSum:
        """Returns `total = x + residual` (x where None) and its layer_norm, where fused in one pass, put in `empty`."""
        _check(x, residual, weight, bias)
        if _fused(x):
            total, normalised, statistics = _kernel().forward(x, residual, weight, bias, eps, empty)
            return NormalisedSum(total, normalised, weight, (statistics,))
        total = x if residual is None else x + residual
        normalised, *both = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
        return NormalisedSum(total, normalised, weight, tuple(both))

    def backward(self, of_normalised: Tensor, of_total: Tensor | None = None, *, empty: Empty = torch.empty) -> Tensor:
        """Returns the gradient at x, from those at `normalised` and at `total`; residual has the same."""
        if len(self._statistics) == 1:
            given = (self.total, self._weight, self._statistics[0], of_total, of_normalised)
            found: Tensor = _kernel().backward(*given, False, empty)[0]
            return found
        backward = torch.ops.aten.native_layer_norm_backward
        shape, mask = list(self._weight.shape), [True, False, False]
        grad: Tensor = backward(of_normalised, self.total, shape, *self._statistics, self._weight, None, mask)[0]
        return grad if of_total is None else of_total + grad


def _fused(x: Tensor) -> bool:
    if x.dtype not in _KERNEL_DTYPES or x.shape[-1] > _MOST_COLUMNS or torch._C._are_functorch_transforms_active():
        return False
    return backends.implementation("layer_norm", x.device.type) == "triton"


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise InputError(f"expected x [..., C] of a floating dtype with C >= 1, got {x.dtype} {list(x.shape)}")
    for name, other, shape in (
        ("residual", residual, x.shape),
        ("weight", weight, x.shape[-1:]),
        ("bias", bias, x.shape[-1:]),
    ):
        if other is None:
            continue
        if other.shape != shape:
            raise InputError(f"expected {name} {list(shape)} for x {list(x.shape)}, got {list(other.shape)}")
        if other.dtype != x.dtype:
            raise InputError(f"expected {name} in the dtype of x ({x.dtype}), got {other.dtype}; convert it first")
        if other.device != x.device:
            raise InputError(f"expected {name} on the device of x ({x.device}), got {other.device}; move it there")


def _kernel() -> ModuleType:
    from ..kernels import layer_norm

    return layer_norm


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        total, normalised, statistics = _kernel().forward(x, residual, weight, bias, eps)
        ctx.added = residual is not None
        ctx.save_for_backward(total if ctx.added else x, weight, statistics)
        return (total, normalised) if ctx.added else normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, statistics = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_total = grads[0] if ctx.added else None
        grad, parameters = _kernel().backward(total, weight, statistics, of_total, grads[-1], wanted[2] or wanted[3])
        grad_weight = parameters[0].to(total.dtype) if parameters is not None and wanted[2] else None
        grad_bias = parameters[1].to(total.dtype) if parameters is not None and wanted[3] else None
        return grad if wanted[0] else None, grad if wanted[1] else None, grad_weight, grad_bias, None
