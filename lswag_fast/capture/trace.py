"""The shape-only run: which Parameters are weights, where they are used, and where the samples are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from . import functions as fn
from .functions import Kind
from .plan import Plan
from .provenance import Provenance
from .resolve import resolve
from .samples import TRACE_BATCHES
from .sandbox import Sandbox
from .shapes import compute

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Call:
    """One call that capture looks at, as the trace saw it."""

    kind: Kind
    shape: tuple[int, ...] | None = None  # of the input of the product, or of the activation
    weight: str | None = None  # the parameter that the fused path may cover here
    weight_on_right: bool = True
    geometry: tuple[Any, ...] | None = None  # (offset, shape, strides) of a weight that is a view; None: a copy
    settings: tuple[Any, ...] = ()  # stride, padding, dilation and groups of a convolution
    channel_axis: int = -1
    symmetric: bool = True
    # Parameters that only the slow path covers here: why, and the shape of the operand they were found in.
    operands: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    operand_shapes: list[tuple[int, ...]] = field(default_factory=list)
    node: Any = None  # of the result
    activation: str | None = None


@dataclass
class Recording:
    """One traced forward pass."""

    calls: list[Call]
    output: Any
    loss: Tensor | None
    provenance: Provenance
    multiply_adds: int
    coupled: bool
    bypassed: set[str]  # parameters that reached an operation other than through the module that holds them


class Tracer(TorchFunctionMode):
    """Records the calls of a forward pass, cutting the graph at every weight the fused path may cover.

    A parameter that the backward pass still reaches after that has a use which only the slow path covers.
    """

    def __init__(self, provenance: Provenance, originals: dict[int, str]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.multiply_adds = 0
        self.coupled = False
        self.bypassed: set[str] = set()
        self._provenance = provenance
        self._originals = originals

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func`, recording what capture looks at."""
        kwargs = kwargs or {}
        kind = fn.kind_of(func, args, kwargs)
        self.bypassed.update(self._originals[id(t)] for t in fn.tensors_in((args, kwargs)) if id(t) in self._originals)
        if kind is None:
            return compute(kind, func, args, kwargs)
        if kind is Kind.COMPOSITE:
            with self:
                return fn.run_body(func, args, kwargs)
        if kind in fn.UNPLANNED:
            self.coupled |= kind is Kind.BATCH_NORM and fn.batch_norm_uses_batch(func, args, kwargs)
            return compute(kind, func, args, kwargs)
        call = Call(kind)
        out = self._run(call, func, args, kwargs)
        self.calls.append(call)
        self.multiply_adds += fn.multiply_adds(kind, func, args, kwargs, out)
        return out

    def _run(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call.kind is Kind.LINEAR:
            return self._linear(call, fn.linear_arguments(args, kwargs))
        if call.kind is Kind.MATMUL:
            return self._matmul(call, func, args, kwargs)
        if call.kind is Kind.CONVOLUTION:
            return self._convolution(call, func, args, kwargs)
        out = compute(call.kind, func, args, kwargs)
        if call.kind is Kind.ACTIVATION:
            call.activation, pre, _ = fn.activation_kind(func, args, kwargs)
            call.shape = tuple(pre.shape)
        elif call.kind is Kind.PRODUCT:
            reason = f"used by {getattr(func, '__name__', func)}, which has no fused rule"
            for operand in fn.tensors_in((args, kwargs)):
                self._add_operand(call, operand, reason)
            call.node = fn.tensors_in(out)[0].grad_fn
        return out

    def _linear(self, call: Call, product: fn.Product) -> Tensor:
        weight = self._weight(call, product.weight, product.x)
        call.shape = tuple(product.x.shape)
        linear = torch.nn.functional.linear
        out: Tensor = compute(Kind.LINEAR, linear, (product.x, weight, product.bias), {})
        call.node = out.grad_fn
        return out.transpose(-1, -2) if product.transposed else out

    def _matmul(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        left, right, addend = fn.matmul_operands(func, args, kwargs)
        plain = kwargs.get("beta", 1) == 1 and kwargs.get("alpha", 1) == 1
        for on_right, operand, other in ((True, right, left), (False, left, right)):
            source = self._provenance.of(operand)
            product = fn.as_linear(left, right, addend, on_right) if source.is_weight and plain else None
            if product is not None and self._provenance.of(other).samples:
                call.weight_on_right = on_right
                return self._linear(call, product)
        for operand in (left, right):
            self._add_operand(call, operand, "used by a matrix product that has no fused rule")
        out = func(*args, **kwargs)
        call.node = out.grad_fn
        return out

    def _convolution(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        conv = fn.convolution_arguments(args, kwargs)
        weight = self._weight(call, conv.weight, conv.x)
        call.shape, call.symmetric = tuple(conv.x.shape), conv.symmetric
        call.settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
        call.channel_axis = conv.x.dim() - conv.weight.dim() + 1  # a single image has no axis before its channels
        positional = (conv.x, weight, *args[2:]) if len(args) > 1 else (conv.x,)
        named = {k: v for k, v in kwargs.items() if k != "input"}
        if "weight" in named:
            named["weight"] = weight
        out: Tensor = func(*positional, **named)
        call.node = out.grad_fn
        return out

    def _weight(self, call: Call, operand: Tensor, x: Tensor) -> Tensor:
        """Returns the operand to compute with: cut from the graph where the fused path may cover this use."""
        name = self._provenance.rearranged(operand)
        if name is None or not x.requires_grad or not torch.is_grad_enabled():
            if name is not None and not torch.is_grad_enabled():
                reason = "used where autograd does not record"
            elif name is not None:
                reason = "its input has no sample axis"
            else:
                reason = "used through a function of itself"
            self._add_operand(call, operand, reason, lookups=True)
            return operand
        call.weight = name
        leaf = self._provenance.leaf(name)
        if operand.untyped_storage()._cdata == leaf.untyped_storage()._cdata:
            call.geometry = (operand.storage_offset(), tuple(operand.shape), operand.stride())
        return operand.detach()

    def _add_operand(self, call: Call, operand: Tensor, reason: str, lookups: bool = False) -> None:
        source = self._provenance.of(operand)
        names = source.weights | (source.tables if lookups else frozenset())
        if source.samples or not names:
            return
        call.operands.update(dict.fromkeys(sorted(names), (reason, tuple(operand.shape))))


class ShapeTracer(TorchFunctionMode):
    """Records the shapes of the same calls at another batch size."""

    def __init__(self, first: list[Call]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.multiply_adds = 0
        self._first = first

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func`, recording shapes."""
        kwargs = kwargs or {}
        kind = fn.kind_of(func, args, kwargs)
        if kind is None or kind in fn.UNPLANNED:
            return compute(kind, func, args, kwargs)
        if kind is Kind.COMPOSITE:
            with self:
                return fn.run_body(func, args, kwargs)
        call = Call(kind)
        before = self._first[len(self.calls)] if len(self.calls) < len(self._first) else Call(kind)
        if kind in (Kind.LINEAR, Kind.CONVOLUTION, Kind.ACTIVATION) or before.weight is not None:
            call.shape = tuple(fn.input_of(kind, func, args, kwargs, before.weight_on_right).shape)
        if before.operands:
            call.operand_shapes = [tuple(t.shape) for t in fn.tensors_in((args, kwargs))]
        out = compute(kind, func, args, kwargs)
        self.calls.append(call)
        self.multiply_adds += fn.multiply_adds(kind, func, args, kwargs, out)
        return out


def trace(sandbox: Sandbox, images: Tensor, labels: Any, loss: Loss, extra_parameters: Sequence[str] = ()) -> Plan:
    """Returns the plan of a score of the model in `sandbox` on batches like `images` [S, ...].

    Runs the forward pass on shapes alone, at two batch sizes; where the model cannot be run so, on two and three
    real images. Raises InputError where the model does not run, where the loss does not return one value a sample,
    or where no weight is found.
    """
    try:
        first = record(sandbox, images[: TRACE_BATCHES[0]], labels, loss, "meta")
        second = _record_shapes(sandbox, images, "meta", first)
    except Exception:
        device = str(images.device)
        batch, batch_labels = take(images, TRACE_BATCHES[0]), take(labels, TRACE_BATCHES[0])
        first = record(sandbox, batch, batch_labels, loss, device)
        second = _record_shapes(sandbox, images, device, first)
    return resolve(sandbox, first, second, extra_parameters)


def take(values: Any, count: int) -> Any:
    """Returns the first `count` entries of a batch, repeating it where it is shorter; other values as they are."""
    if not isinstance(values, Tensor) or values.dim() == 0:
        return values
    return values[torch.arange(count, device=values.device) % values.shape[0]]  # an index elsewhere would be waited for


def record(sandbox: Sandbox, images: Tensor, labels: Any, loss: Loss, device: str) -> Recording:
    """Traces one forward pass and its loss on `images`; on "meta", their shapes alone are used."""
    leaves, buffers = sandbox.stand_ins(device)
    batch = images.detach().to(device=device, dtype=sandbox.dtype).requires_grad_()
    provenance = Provenance(leaves, batch)
    originals = {id(p): n for n, p in sandbox.originals.items() if p.dim() > 1}
    tracer = Tracer(provenance, originals)
    labels = labels[: len(batch)].to(device) if isinstance(labels, Tensor) else labels
    try:
        with tracer:
            output = sandbox.run(leaves, buffers, batch)
    except Exception as error:
        shape = ", ".join(str(n) for n in images.shape[1:])
        if sandbox.dtype is torch.float32:
            remedy = ""
        else:
            remedy = f" (it ran in {str(sandbox.dtype).removeprefix('torch.')}; dtype='float32' may run)"
        raise InputError(
            f"the model does not run on images [S, {shape}]: {type(error).__name__}: {error}{remedy}"
        ) from error
    value = checked_loss(loss, output, labels, len(batch))
    return Recording(tracer.calls, output, value, provenance, tracer.multiply_adds, tracer.coupled, tracer.bypassed)


def checked_loss(loss: Loss, output: Any, labels: Any, samples: int) -> Tensor:
    """Returns loss(output, labels); raises InputError unless it is one differentiable value a sample, [S]."""
    try:
        value = loss(output, labels)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the loss cannot take the model's output ({describe(output)}): {type(error).__name__}: {error}; "
            "pass loss=callable(output, labels) that returns one loss a sample, [S]"
        ) from error
    if not isinstance(value, Tensor) or tuple(value.shape) != (samples,):
        raise InputError(
            f"the loss must return one value a sample, a tensor [S], got {describe(value)} for {samples} samples; "
            "use reduction='none' and reduce every axis but the first"
        )
    if not value.requires_grad:
        raise InputError("the loss does not depend on the model's output through differentiable operations")
    return value


def describe(value: Any) -> str:
    """Returns the type of a value, and its shape where it is a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"a {type(value).__name__}"


def _record_shapes(sandbox: Sandbox, images: Tensor, device: str, first: Recording) -> ShapeTracer:
    leaves, buffers = sandbox.stand_ins(device)
    count = TRACE_BATCHES[1]
    if device == "meta":
        batch = torch.empty((count, *images.shape[1:]), dtype=sandbox.dtype, device=device)
    else:
        batch = take(images, count).to(sandbox.dtype)
    tracer = ShapeTracer(first.calls)
    with tracer, torch.no_grad():
        sandbox.run(leaves, buffers, batch)
    return tracer
