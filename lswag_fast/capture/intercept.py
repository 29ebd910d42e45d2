"""Linear maps, convolutions and activations that hand what passes through them to a sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from ..ops.gelu import activation_backward
from .functions import ConvolutionCall

Sink = Callable[[Tensor, Tensor], None]
"""Called in the backward pass with the input of an operation and the gradient at its output."""


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink = sink
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.sink(x, grad)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        sink: Sink,
        call: ConvolutionCall,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink = sink
        ctx.settings = (call.stride, call.padding, call.dilation, False, (0,) * len(call.stride), call.groups)
        return torch.convolution(x, weight, bias, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.sink(x, grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            mask = (True, False, False)
            grad_x = torch.ops.aten.convolution_backward(grad, x, weight, None, *ctx.settings, mask)[0]
        return grad_x, None, None, None, None, None


class _Activation(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, kind: str, apply: Callable[[Tensor], Tensor]) -> Tensor:
        post = apply(pre.detach())
        ctx.kind = kind  # type: ignore[attr-defined]
        ctx.save_for_backward(post if kind == "relu" else pre)
        return post

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return activation_backward(grad, saved, ctx.kind), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, sink: Sink) -> Tensor:
    """Applies a linear map to x [..., I]; the backward pass calls `sink` and computes no weight gradient.

    `anchor` is a tensor that requires a gradient: it puts the operation on the graph where nothing else does.
    """
    return _Linear.apply(x, weight, bias, anchor, sink)  # type: ignore[no-any-return,no-untyped-call]


def convolution(call: ConvolutionCall, anchor: Tensor, sink: Sink) -> Tensor:
    """Returns the convolution of `call`, under the same rule as `linear`."""
    return _Convolution.apply(call.x, call.weight, call.bias, anchor, sink, call)  # type: ignore[no-any-return,no-untyped-call]


def activation(pre: Tensor, kind: str, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns apply(pre), which computes the activation `kind`, differentiably."""
    return _Activation.apply(pre, kind, apply)  # type: ignore[no-any-return,no-untyped-call]
