"""Which of the entries on a folded axis belong to which sample: told by changing one of two images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .functions import Kind, input_of
from .plan import Activation, Plan, Use
from .run import CaptureMode
from .samples import SampleAxis
from .sandbox import Sandbox


def probe(plan: Plan, sandbox: Sandbox, images: Tensor) -> None:
    """Settles, in `plan`, the order of samples on every axis that holds several entries a sample.

    Runs two images ([2, ...]) forward twice, the second time with the second one changed: the entries that change
    are its own. Where that does not tell the order, the weight goes to the slow path and the activation is left out
    of the count. Where there is such an axis, the host waits for a device: what it finds decides which pass comes next.
    """
    folded = [a for a in plan.actions if a is not None and a.axis is not None and a.axis.factor > 1]
    if not folded:
        return
    modules = [module for module in sandbox.model.modules() if module.training]
    images = images.detach().to(sandbox.dtype)
    before, after = _Watch(plan), _Watch(plan)
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            with before:
                sandbox(images)
            with after:
                sandbox(torch.stack([images[0], 1 - images[1]]))
    finally:
        for module in modules:
            module.training = True
    for action in folded:
        axis = action.axis
        assert axis is not None
        changed = before.seen[action.call].ne(after.seen[action.call]).movedim(axis.axis, 0).flatten(1).any(1)
        order = _order(changed, axis)
        if order is not None:
            plan.actions[action.call] = replace(action, axis=order)
        elif isinstance(action, Use):
            plan.layers[action.layer].slow_reason = "the order of samples on a folded axis cannot be told"
        else:
            plan.actions[action.call] = replace(action, axis=None)
    plan.drop_uses(lambda layer: not layer.fused)
    plan.activations = [a for a in plan.actions if isinstance(a, Activation)]


def _order(changed: Tensor, axis: SampleAxis) -> SampleAxis | None:
    """Returns the axis with its order, from which of its entries changed with the second of two samples."""
    first, second = changed[: axis.factor], changed[axis.factor :]
    together = bool(second.any()) and not bool(first.any())
    alternating = bool(changed[1::2].any()) and not bool(changed[::2].any())
    if together == alternating:
        return None
    return axis if together else axis.interleaved()


class _Watch(CaptureMode):
    """Keeps what enters every product and activation with a folded axis."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, consumer=None, samples=2, fused=True)  # type: ignore[arg-type]
        self.seen: dict[int, Tensor] = {}

    def _product(self, action: Use, kind: Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if action.axis.factor > 1:
            self.seen[action.call] = input_of(kind, func, args, kwargs, action.weight_on_right).clone()
        out: Tensor = func(*args, **kwargs)
        return out

    def _activation(self, action: Activation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if action.axis is not None and action.axis.factor > 1:
            self.seen[action.call] = input_of(Kind.ACTIVATION, func, args, kwargs, True).clone()
        out: Tensor = func(*args, **kwargs)
        return out
