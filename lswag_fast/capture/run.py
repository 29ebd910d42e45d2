"""The real run: one forward and backward pass that follows a plan, and the exact slow path beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..clock import Clock
from ..errors import ScoreError
from ..ops.gradient_moments import Convolution
from . import functions as fn
from . import intercept
from .functions import Kind
from .plan import Activation, Layer, Plan, Use
from .sandbox import Sandbox

Loss = Callable[[Any, Any], Tensor]


class Consumer(Protocol):
    """What a proxy does with what is captured. Tensors are valid during the call only."""

    def wants(self, activation: Activation) -> bool:
        """Whether this activation is to be handed over."""

    def activate(self, activation: Activation, pre: Tensor, kind: str) -> Tensor:
        """Computes the activation of pre [S, ...] and reads it; returns it in the layout of `pre`."""

    def activated(self, activation: Activation, post: Tensor, first_sample: int) -> None:
        """Reads a post-activation [s, ...]: that of the samples from `first_sample` on."""

    def weight(
        self,
        layer: Layer,
        inputs: list[Tensor],
        output_grads: list[Tensor],
        convolution: Convolution | None,
        operand: Tensor,
    ) -> None:
        """Reads the inputs [S, ..., I] and output gradients [S, ..., O] of every use of a weight.

        `operand` is the weight as its first use has it: [O, I], or the kernel of the convolution.
        """

    def group_gradient(self, layer: Layer, gradient: Tensor) -> None:
        """Reads the gradient of the next group's mean loss, for a weight on the slow path."""

    def wants_outputs(self) -> bool:
        """Whether the outputs of layers are to be handed over."""

    def output(self, layer: Layer, output: Tensor, output_grad: Tensor, channel_axis: int) -> None:
        """Reads the output of one use of a layer, samples first, and the gradient there; `channel_axis` is negative."""


class CaptureMode(TorchFunctionMode):
    """Follows a plan call by call. `fused` False: only activations are captured."""

    def __init__(self, plan: Plan, consumer: Consumer, samples: int, *, fused: bool, first_sample: int = 0) -> None:
        super().__init__()
        self._plan = plan
        self._consumer = consumer
        self._samples = samples
        self._fused = fused
        self._first_sample = first_sample
        self._next = 0
        self.anchor = torch.zeros((), requires_grad=True)
        self._pending: dict[int, list[tuple[Use, Tensor, Tensor]]] = {}
        self._operands: dict[int, Tensor] = {}
        self.delivered: set[int] = set()  # layers handed over, by position in the plan
        self._uses = [sum(isinstance(a, Use) and a.layer == i for a in plan.actions) for i in range(len(plan.layers))]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func` as the plan says."""
        kwargs = kwargs or {}
        kind = fn.kind_of(func, args, kwargs)
        if kind is None or kind in fn.UNPLANNED:
            return func(*args, **kwargs)
        if kind is Kind.COMPOSITE:
            with self:
                return fn.run_body(func, args, kwargs)
        action = self._take_action(kind)
        if isinstance(action, Activation):
            return self._activation(action, func, args, kwargs)
        index = self._next - 1
        if isinstance(action, Use) and self._fused:
            out = self._product(action, kind, func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        use = action if action is not None else self._plan.observed.get(index)
        if use is not None and out.requires_grad and self._plan.layers[use.layer].kept:
            self._observe(use, kind, out, lambda: func(*args, **kwargs))
        return out

    def _observe(self, use: Use, kind: Kind, out: Tensor, again: Callable[[], Tensor]) -> None:
        """Hands over an output of a layer once its gradient is known; computes it again where it was overwritten."""
        if not self._consumer.wants_outputs():
            return
        channel_axis = 1 - out.dim() if kind is Kind.CONVOLUTION else -1
        kept, version = out.detach(), out._version

        def by_sample(tensor: Tensor) -> Tensor:
            rows = tensor.detach() if use.weight_on_right else tensor.detach().transpose(-1, -2)
            return use.axis.split(rows, self._samples)

        def observed(grad: Tensor) -> None:
            with torch.no_grad():
                output = kept if kept._version == version else again()
            self._consumer.output(self._plan.layers[use.layer], by_sample(output), by_sample(grad), channel_axis)

        out.register_hook(observed)  # type: ignore[no-untyped-call]

    def _product(self, action: Use, kind: Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if kind is Kind.CONVOLUTION:
            call = fn.convolution_arguments(args, kwargs)
            geometry = _convolution(call)
            return intercept.convolution(
                call, self.anchor, lambda x, grad: self._deliver(action, x, grad, geometry, call.weight)
            )
        if kind is Kind.LINEAR:
            product: fn.Product | None = fn.linear_arguments(args, kwargs)
        else:
            product = fn.as_linear(*fn.matmul_operands(func, args, kwargs), action.weight_on_right)
        assert product is not None
        out = intercept.linear(
            product.x,
            product.weight,
            product.bias,
            self.anchor,
            lambda x, grad: self._deliver(action, x, grad, None, product.weight),
        )
        return out.transpose(-1, -2) if product.transposed else out

    def _take_action(self, kind: Kind) -> Use | Activation | None:
        index = self._next
        self._next += 1
        if index >= len(self._plan.kinds) or self._plan.kinds[index] is not kind:
            raise ScoreError("the model's forward pass took another course than on shapes alone; it cannot be captured")
        return self._plan.actions[index]

    def _activation(self, action: Activation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        kind, pre, inplace = fn.activation_kind(func, args, kwargs)
        if action.axis is None or not self._consumer.wants(action):
            out: Tensor = func(*args, **kwargs)
            return out
        axis = action.axis
        if self._fused and not inplace and axis.axis == 0 and axis.factor == 1:
            return intercept.activation(pre, kind, lambda x: self._consumer.activate(action, x, kind))
        post: Tensor = func(*args, **kwargs)
        self._consumer.activated(action, axis.split(post.detach(), self._samples), self._first_sample)
        return post

    def _deliver(self, use: Use, x: Tensor, grad: Tensor, convolution: Convolution | None, operand: Tensor) -> None:
        pending = self._pending.setdefault(use.layer, [])
        pending.append((use, x, grad))
        if not use.swapped:
            self._operands[use.layer] = operand
        if len(pending) < self._uses[use.layer]:
            return
        del self._pending[use.layer]
        self.delivered.add(use.layer)
        inputs: list[Tensor] = []
        grads: list[Tensor] = []
        for one, a, d in pending:
            for a_view, d_view in self._by_sample(one, a, d, convolution):
                inputs.append(d_view if one.swapped else a_view)
                grads.append(a_view if one.swapped else d_view)
        self._consumer.weight(
            self._plan.layers[use.layer], inputs, grads, convolution, self._operands.pop(use.layer).detach()
        )

    def _by_sample(
        self, use: Use, x: Tensor, grad: Tensor, convolution: Convolution | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns views with the samples first; a convolution's folded axis becomes uses of its own."""
        x, grad = use.axis.split(x, self._samples), use.axis.split(grad, self._samples)
        if convolution is None:
            return [(x, grad)]
        if x.dim() - (use.axis.factor > 1) == 3:
            x, grad = x.unsqueeze(-2), grad.unsqueeze(-2)
        if use.axis.factor == 1:
            return [(x, grad)]
        return [(x[:, i], grad[:, i]) for i in range(use.axis.factor)]


def run(
    plan: Plan,
    sandbox: Sandbox,
    images: Tensor,
    labels: Any,
    loss: Loss,
    groups: int,
    consumer: Consumer,
    clock: Clock,
) -> Tensor:
    """Runs the model on `images` [S, ...], hands `consumer` everything the plan says, and returns the losses [S].

    One forward and backward pass of the whole batch covers the fused weights; the weights on the slow path (all of
    them where the samples are coupled) take one forward and backward pass a group. Nothing here waits for a device,
    so the losses are yet to be checked (`check_losses`).
    """
    samples = images.shape[0]
    images = images.detach().to(sandbox.dtype)
    kept: list[Tensor] = []
    if plan.coupled is None:
        mode = CaptureMode(plan, consumer, samples, fused=True)
        with clock("forward"), mode:
            output = sandbox(images)
        losses = loss(output, labels)
        kept = [losses.detach()]
        expected = {action.layer for action in plan.actions if isinstance(action, Use)}
        if expected:
            # To the anchor alone: no leaf of the model, the loss or the images gets a gradient.
            with clock("backward"):
                torch.autograd.grad(losses.sum(), mode.anchor, allow_unused=True)
        del output, losses
        for missing in expected - mode.delivered:
            plan.layers[missing].slow_reason = "the backward pass did not reach every use of it"
    slow = [layer for layer in plan.layers if layer.kept and not layer.fused]
    if slow or plan.coupled is not None:
        of_groups = _run_groups(plan, slow, sandbox, images, labels, loss, groups, consumer, clock)
        kept = kept or of_groups
    return torch.cat(kept)


def _run_groups(
    plan: Plan,
    slow: list[Layer],
    sandbox: Sandbox,
    images: Tensor,
    labels: Any,
    loss: Loss,
    groups: int,
    consumer: Consumer,
    clock: Clock,
) -> list[Tensor]:
    kept = []
    leaves = {layer.name: sandbox.parameters[layer.name].detach().requires_grad_() for layer in slow}
    samples = images.shape[0]
    size = samples // groups
    for first in range(0, samples, size):
        part = images[first : first + size]
        part_labels = labels[first : first + size] if isinstance(labels, Tensor) else labels
        parameters = {**sandbox.parameters, **leaves}
        mode = CaptureMode(plan, consumer, size, fused=False, first_sample=first) if plan.coupled else nullcontext()
        with clock("forward"), mode:
            output = sandbox.run(parameters, sandbox.buffers, part)
        losses = loss(output, part_labels)
        kept.append(losses.detach())
        if not slow:
            continue
        with clock("backward"):
            gradients = torch.autograd.grad(losses.mean(), list(leaves.values()), allow_unused=True)
        for layer, gradient in zip(slow, gradients, strict=True):
            consumer.group_gradient(layer, torch.zeros_like(leaves[layer.name]) if gradient is None else gradient)
    return kept


def check_losses(losses: Tensor) -> None:
    """Raises ScoreError where one of [S] losses is not finite, and says of which sample."""
    for sample, loss in enumerate(losses.tolist()):
        if not math.isfinite(loss):
            raise ScoreError(f"the loss of sample {sample} is {loss}, not a finite number")


def _convolution(call: fn.ConvolutionCall) -> Convolution:
    def pair(values: tuple[int, ...], fill: int) -> tuple[int, int]:
        return (fill, values[0]) if len(values) == 1 else (values[0], values[1])

    return Convolution(
        kernel_size=pair(tuple(call.weight.shape[2:]), 1),
        stride=pair(call.stride, 1),
        padding=pair(call.padding, 0),
        dilation=pair(call.dilation, 1),
        groups=call.groups,
    )
