"""Which of the entries on a folded axis belong to which sample: told by changing one of two images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import value_checks
from ..errors import ScoreError
from ..value_checks import LateChecks
from .functions import Kind, input_of
from .plan import Activation, Plan, Use
from .run import CaptureMode
from .sandbox import Sandbox

SAMPLES = 2
UNKNOWN = "the order of samples on a folded axis cannot be told"


class UnknownOrderError(ScoreError):
    """A pass took for granted that every order can be told, and one cannot; the plan is settled by now."""


def probe(plan: Plan, sandbox: Sandbox, images: Tensor, late: LateChecks | None = None) -> None:
    """Settles, in `plan`, the order of samples on every axis that holds several entries a sample.

    Runs two images ([2, ...]) forward twice, the second time with the second one changed: the entries that change
    are its own. Where that does not tell the order, the weight goes to the slow path and the activation is left out
    of the count.

    With `late` nothing waits for a device: the plan takes for granted that every order can be told, and names where
    the device has it (`SampleAxis.sample_major`). `late` settles the plan once the orders are on the host, and raises
    UnknownOrderError where one cannot be told: a pass that followed the plan until then is to be run again.
    """
    folded = [a for a in plan.actions if a is not None and a.axis is not None and a.axis.factor > 1]
    if not folded:
        return
    orders = _orders(folded, *_inputs(plan, sandbox, images))
    if late is None or not value_checks.computes_apart(images):
        _apply_orders(plan, folded, _read_orders(orders))
        return

    def settle(brought: Tensor) -> None:
        told = _read_orders(brought)
        _apply_orders(plan, folded, told)
        if None in told:
            raise UnknownOrderError(UNKNOWN)

    late.add("orders", orders, settle)
    _apply_orders(plan, folded, orders[:, 0].unbind())


def _inputs(plan: Plan, sandbox: Sandbox, images: Tensor) -> list[dict[int, Tensor]]:
    """Returns what enters every call with a folded axis, before and after the second image changes."""
    modules = [module for module in sandbox.model.modules() if module.training]
    images = images.detach().to(sandbox.dtype)
    watches = [_Watch(plan), _Watch(plan)]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            for watch, batch in zip(watches, (images, torch.stack([images[0], 1 - images[1]])), strict=True):
                with watch:
                    sandbox(batch)
    finally:
        for module in modules:
            module.training = True
    return [watch.seen for watch in watches]


def _orders(folded: Sequence[Use | Activation], before: dict[int, Tensor], after: dict[int, Tensor]) -> Tensor:
    """Returns bools [n, 2]: whether the entries of the second sample are the second half, or every other one."""
    rows = []
    for action in folded:
        assert action.axis is not None
        changed = before[action.call].ne(after[action.call]).movedim(action.axis.axis, 0).flatten(1).any(1)
        rows.append(torch.stack([changed.view(SAMPLES, -1).any(1), changed.view(-1, SAMPLES).any(0)]))
    first, second = torch.stack(rows).unbind(-1)
    return second & ~first


def _read_orders(orders: Tensor) -> list[bool | None]:
    """Returns, from `_orders`, whether the entries of one sample lie together; None where that cannot be told."""
    return [None if together == alternating else together for together, alternating in orders.tolist()]


def _apply_orders(plan: Plan, folded: Sequence[Use | Activation], sample_major: Sequence[bool | Tensor | None]) -> None:
    """Gives the axes of these actions their orders; what is left without one is taken out of the fused path."""
    for action, together in zip(folded, sample_major, strict=True):
        if together is not None:
            assert action.axis is not None
            plan.actions[action.call] = replace(action, axis=replace(action.axis, sample_major=together))
        elif isinstance(action, Use):
            plan.layers[action.layer].slow_reason = UNKNOWN
        else:
            plan.actions[action.call] = replace(action, axis=None)
    plan.drop_uses(lambda layer: not layer.fused)
    plan.activations = [a for a in plan.actions if isinstance(a, Activation)]


class _Watch(CaptureMode):
    """Keeps what enters every product and activation with a folded axis."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, consumer=None, samples=SAMPLES, fused=True)  # type: ignore[arg-type]
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
