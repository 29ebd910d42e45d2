"""From two traced forward passes to a plan: layers in order, fused or slow, and the sample axis of every tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError
from .functions import Kind
from .plan import Activation, Layer, Plan, Use
from .samples import SHARED, TRACE_BATCHES, SampleAxis, find_axis

if TYPE_CHECKING:
    from .sandbox import Sandbox
    from .trace import Call, Recording, ShapeTracer


def resolve(sandbox: Sandbox, first: Recording, second: ShapeTracer, extra_parameters: Sequence[str]) -> Plan:
    """Returns the plan that follows from the two recordings. Raises InputError where the model has no weights."""
    kinds = [c.kind for c in first.calls]
    if kinds != [c.kind for c in second.calls]:
        raise InputError(
            "the model's forward pass takes another course at another batch size, so that it cannot be captured"
        )
    resolver = _Resolver(sandbox, first, second)
    layers = resolver.layers(extra_parameters)
    actions = resolver.actions(layers)
    per_image = second.multiply_adds - first.multiply_adds
    images = TRACE_BATCHES[1] - TRACE_BATCHES[0]
    return Plan(
        layers=layers,
        activations=[a for a in actions if isinstance(a, Activation)],
        kinds=kinds,
        actions=actions,
        coupled=resolver.coupled,
        uncovered=resolver.uncovered,
        multiply_adds=first.multiply_adds - (TRACE_BATCHES[0] - 1) * per_image // images,
        parameters=sum(p.numel() for p in sandbox.originals.values()),
        observed=resolver.observed(layers),
    )


class _Resolver:
    def __init__(self, sandbox: Sandbox, first: Recording, second: ShapeTracer) -> None:
        self._sandbox = sandbox
        self._first = first
        self._second = second
        assert first.loss is not None
        self._reached_nodes, self._left_over = first.provenance.reachable([first.loss])
        self._axes: dict[int, SampleAxis | str] = {}
        self._swapped: dict[int, bool] = {}
        self._observable: set[str] = set()
        self.coupled = _coupled_layer(sandbox) if first.coupled else None
        self.uncovered: tuple[str, ...] = ()

    def layers(self, extra_parameters: Sequence[str]) -> list[Layer]:
        """Returns the layers in order of first use."""
        found: dict[str, Layer] = {}
        uncovered = set(self._first.bypassed)
        for index, call in enumerate(self._first.calls):
            if call.weight is not None:
                layer = found.setdefault(call.weight, self._layer(call.weight, index))
                layer.calls.append(index)
            for name, reason in self._slow_operands(index, call).items():
                if name not in self._left_over and name not in found and self._is_hidden(call):
                    uncovered.add(name)
                    continue
                layer = found.setdefault(name, self._layer(name, index))
                layer.slow_reason = layer.slow_reason or reason
        for name in extra_parameters:
            if name not in self._sandbox.originals:
                raise InputError(f"extra_parameters names {name!r}, which the model does not have")
            if not self._sandbox.originals[name].is_floating_point():
                raise InputError(f"extra_parameters names {name!r}, which has no gradient: it holds no real numbers")
            layer = found.setdefault(name, self._layer(name, len(self._first.calls)))
            layer.slow_reason = layer.slow_reason or "asked for by extra_parameters"
        coupled = f"the samples are coupled by {self.coupled}" if self.coupled else None
        for layer in found.values():
            own_reason = layer.slow_reason or self._reason_against_fusing(layer)
            layer.slow_reason = coupled or own_reason
            if coupled and own_reason is None:
                self._observable.add(layer.name)
        self.uncovered = tuple(sorted(uncovered - found.keys()))
        if not found:
            raise InputError(
                "the model uses no Parameter as the matrix of a linear map or the kernel of a convolution, so there "
                "is nothing to score" + (f" (not covered: {', '.join(self.uncovered)})" if self.uncovered else "")
            )
        return sorted(found.values(), key=lambda layer: layer.first_call)

    def actions(self, layers: list[Layer]) -> list[Use | Activation | None]:
        """Returns what the real run does at each call."""
        positions = {layer.name: i for i, layer in enumerate(layers)}
        actions: list[Use | Activation | None] = []
        last_used = 0
        for index, call in enumerate(self._first.calls):
            for name in (call.weight, *call.operands):
                last_used = positions[name] + 1 if name in positions else last_used
            if call.kind is Kind.ACTIVATION:
                actions.append(self._activation(index, call, last_used))
                continue
            fused = call.weight is not None and layers[positions[call.weight]].fused
            if not fused or call.node not in self._reached_nodes:
                actions.append(None)
                continue
            axis = self._axes[index]
            assert isinstance(axis, SampleAxis)
            assert call.weight is not None
            swapped = self._swapped.get(index, False)
            actions.append(Use(index, positions[call.weight], axis, swapped, call.weight_on_right))
        return actions

    def observed(self, layers: list[Layer]) -> dict[int, Use]:
        """Returns the uses of layers that would be fused if samples were not coupled, by the call."""
        found: dict[int, Use] = {}
        for position, layer in enumerate(layers):
            reached = [i for i in layer.calls if self._first.calls[i].node in self._reached_nodes]
            axes = {i: self._axes[i] for i in reached} if layer.name in self._observable else {}
            for index, axis in axes.items():
                # Which entries of a folded axis are whose is told by changing an image, which changes all of them here.
                if any(not isinstance(a, SampleAxis) or a.factor != 1 for a in axes.values()):
                    break
                assert isinstance(axis, SampleAxis)
                on_right = self._first.calls[index].weight_on_right
                found[index] = Use(index, position, axis, self._swapped.get(index, False), on_right)
        return found

    def _layer(self, name: str, index: int) -> Layer:
        return Layer(name, self._sandbox.originals[name].numel(), index)

    def _slow_operands(self, index: int, call: Call) -> dict[str, str]:
        """Returns the parameters that are operands here, without tokens: operands that grow with the batch."""
        if not call.operands:
            return {}
        others = self._second.calls[index].operand_shapes
        found = {}
        for name, (reason, shape) in call.operands.items():
            full = self._sandbox.originals[name].shape
            # The second operand of a matrix product is noted as linear() takes it, transposed.
            if (shape in others or shape[::-1] in others) and full.numel() > max(full, default=1):
                found[name] = reason
        return found

    def _is_hidden(self, call: Call) -> bool:
        return call.node is None or call.node not in self._reached_nodes

    def _reason_against_fusing(self, layer: Layer) -> str | None:
        """Returns why the fused path cannot cover every use of this layer, or None."""
        if layer.name in self._left_over:
            return "used in other ways too"
        base: tuple[Any, ...] | None = None
        for index in layer.calls:
            call = self._first.calls[index]
            if call.node not in self._reached_nodes:
                continue
            axis = self._axis(index, call)
            self._axes[index] = axis
            if isinstance(axis, str):
                return axis
            if not call.symmetric:
                return "a convolution with more padding on one side"
            if call.kind is Kind.CONVOLUTION and axis.axis != 0:
                return "the samples are not on the first axis of a convolution's input"
            if call.settings != self._first.calls[layer.calls[0]].settings:
                return "used more than once, with different strides, paddings, dilations or groups"
            oriented = call.geometry
            if len(layer.calls) > 1:
                if oriented is None or (call.kind is Kind.CONVOLUTION and base not in (None, oriented)):
                    return "used more than once, not always as the same view"
                if base is not None and oriented != base:
                    if _transposed(oriented) != base:
                        return "used more than once, not always as the same view"
                    self._swapped[index] = True
            base = base or oriented
        return None

    def _axis(self, index: int, call: Call) -> SampleAxis | str:
        other = self._second.calls[index].shape
        if call.shape is None or other is None:
            return "its input has no sample axis"
        return find_axis((call.shape, other), call.channel_axis)

    def _activation(self, index: int, call: Call, last_layer: int) -> Activation:
        other = self._second.calls[index].shape
        assert call.shape is not None
        assert other is not None
        assert call.activation is not None
        found = SHARED if call.shape == other else find_axis((call.shape, other))
        axis = found if isinstance(found, SampleAxis) else None
        positions = math.prod(call.shape) // (1 if axis is SHARED else TRACE_BATCHES[0])
        return Activation(index, call.activation, last_layer, positions, axis)


def _transposed(geometry: tuple[Any, ...]) -> tuple[Any, ...]:
    offset, shape, strides = geometry
    return (offset, shape[::-1], strides[::-1])


def _coupled_layer(sandbox: Sandbox) -> str:
    names = [
        name or type(module).__name__
        for name, module in sandbox.model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]
    return names[0] if names else "a call of batch_norm with training=True"
