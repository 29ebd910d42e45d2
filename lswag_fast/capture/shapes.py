"""The common functions of a forward pass on shapes alone, some ten times cheaper than torch's own meta kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import functions as fn
from .functions import Kind


class _Shape(Function):
    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *sources: Tensor | None) -> Tensor:
        assert sources[0] is not None
        return sources[0].new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("a pass on shapes alone has no backward pass")


def compute(kind: Kind | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns func(*args, **kwargs); of linear, layer_norm and activations on the meta device, its shape alone.

    The result depends, on the autograd graph, on the same tensors.
    """
    if kind is Kind.LINEAR:
        product = fn.linear_arguments(args, kwargs)
        if product.x.is_meta and product.weight.dim() == 2 and product.x.shape[-1] == product.weight.shape[1]:
            shape = (*product.x.shape[:-1], product.weight.shape[0])
            return _shape(shape, product.x, product.weight, product.bias)
    if kind is Kind.LAYER_NORM:
        x = args[0] if args else kwargs["input"]
        if x.is_meta:
            return _shape(tuple(x.shape), x, *(t for t in fn.tensors_in((args[1:], kwargs)) if t is not x))
    if kind is Kind.ACTIVATION:
        _, pre, inplace = fn.activation_kind(func, args, kwargs)
        if pre.is_meta and not inplace:
            return _shape(tuple(pre.shape), pre)
    return func(*args, **kwargs)


def _shape(shape: tuple[int, ...], *sources: Tensor | None) -> Tensor:
    if not torch.is_grad_enabled():
        assert sources[0] is not None
        return sources[0].new_empty(shape)
    return _Shape.apply(shape, *sources)  # type: ignore[no-any-return,no-untyped-call]
