"""The common functions of a forward pass on shapes alone, some ten times cheaper than torch's own meta kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import functions as fn
from .functions import Kind

_SUMS = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__})


class _Shape(Function):
    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...] | None, *sources: Tensor | None) -> Tensor:
        return _empty(shape, sources[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("a pass on shapes alone has no backward pass")


def compute(kind: Kind | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns func(*args, **kwargs); of the usual calls of a vision transformer on the meta device, the shape alone.

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
    if func in _SUMS and len(args) == 2 and not kwargs and _alike(*args):
        return _shape(None, *args)
    if func is F.scaled_dot_product_attention and len(args) == 3 and not kwargs.keys() - {"dropout_p", "is_causal"}:
        queries, keys, values = args
        if _alike(keys, values) and _alike(queries[..., :1, :], keys[..., :1, :]):
            return _shape(tuple(queries.shape), queries, keys, values)
    return func(*args, **kwargs)


def _alike(one: Any, other: Any) -> bool:
    """Tells whether both are tensors on the meta device with one shape and dtype."""
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and one.is_meta and other.is_meta and one.shape == other.shape and one.dtype == other.dtype


def _empty(shape: tuple[int, ...] | None, like: Tensor | None) -> Tensor:
    assert like is not None
    return torch.empty_like(like) if shape is None else like.new_empty(shape)


def _shape(shape: tuple[int, ...] | None, *sources: Tensor | None) -> Tensor:
    """Returns a tensor of a shape that depends on the sources; None: of the first one's shape and strides."""
    if not torch.is_grad_enabled():
        return _empty(shape, sources[0])
    return _Shape.apply(shape, *sources)  # type: ignore[no-any-return,no-untyped-call]
