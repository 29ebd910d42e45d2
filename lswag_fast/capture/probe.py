"""Which of the entries on a folded axis belong to which sample: told by a backward pass of one sample's loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.gradient_moments import Convolution
from .plan import Activation, Plan, Use
from .run import CaptureMode
from .samples import SampleAxis
from .sandbox import Sandbox


def probe(plan: Plan, sandbox: Sandbox, images: Tensor, labels: Any, loss: Callable[[Any, Any], Tensor]) -> None:
    """Settles, in `plan`, the order of samples on every axis that holds several entries a sample.

    Runs two images (those of `images`, [2, ...]) forward, and the first one's loss backward: the gradient is zero at
    every entry of the second. Where that does not tell the order, the weight goes to the slow path and the activation
    is left out of the count.
    """
    folded = [a for a in plan.actions if a is not None and a.axis is not None and a.axis.factor > 1]
    if not folded:
        return
    mode = _Probe(plan)
    training = [module for module in sandbox.model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with mode:
            losses = loss(sandbox(images.to(sandbox.dtype)), labels)
        torch.autograd.backward(losses[0])
    finally:
        for module in training:
            module.training = True
    for action in folded:
        axis = action.axis
        assert axis is not None
        order = _order(mode.touched.get(action.call), axis)
        if order is not None:
            plan.actions[action.call] = replace(action, axis=order)
        elif isinstance(action, Use):
            plan.layers[action.layer].slow_reason = "the order of samples on a folded axis cannot be told"
        else:
            plan.actions[action.call] = replace(action, axis=None)
    plan.drop_uses(lambda layer: not layer.fused)
    plan.activations = [a for a in plan.actions if isinstance(a, Activation)]


def _order(touched: Tensor | None, axis: SampleAxis) -> SampleAxis | None:
    if touched is None:
        return None
    half = axis.factor
    by_sample = bool(touched[:half].any()) and not bool(touched[half:].any())
    alternating = bool(touched[::2].any()) and not bool(touched[1::2].any())
    if by_sample == alternating:
        return None
    return axis if by_sample else axis.interleaved()


class _Probe(CaptureMode):
    """Notes which entries on the sample axis a gradient reaches, at every call of the plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, consumer=None, samples=2, fused=True)  # type: ignore[arg-type]
        self.touched: dict[int, Tensor] = {}

    def _note(self, call: int, axis: SampleAxis, grad: Tensor) -> None:
        self.touched[call] = grad.detach().movedim(axis.axis, 0).flatten(1).ne(0).any(1)

    def _deliver(self, use: Use, x: Tensor, grad: Tensor, convolution: Convolution | None) -> None:
        self._note(use.call, use.axis, grad)

    def _activation(self, action: Activation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        post: Tensor = func(*args, **kwargs)
        axis = action.axis
        if axis is not None and post.requires_grad:
            # Multiplying by one gives the activation a node of its own, also where it was computed in place.
            post = post * torch.ones((), dtype=post.dtype)
            post.register_hook(lambda grad: self._note(action.call, axis, grad))  # type: ignore[no-untyped-call]
        return post
