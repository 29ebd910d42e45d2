"""T-CET: compressibility, orthogonality and topology, layer by layer.

Xiang, Hunter, Xu, Dudziak, Wen: Exploiting Network Compressibility and Topology in Zero-Cost NAS, AutoML 2023. The
formula is that of their public code (lichuanx/T-CET, `compute_orthogornal_score.py`); what of the paper could be read
(its abstract, and what the L-SWAG paper says of it: "a layer-wise NWOT formulation" with a signal-to-noise ratio)
agrees with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..capture import Plan
from ..capture import functions as fn
from ..capture.functions import Kind
from ..capture.plan import Use
from ..errors import InputError
from ..ops.activation_patterns import hamming_kernel, pack_signs
from .determinant import log_determinant
from .evidence import Evidence
from .network import Network
from .proxy import Proxy, UnavailableError
from .synaptic_flow import synaptic_flow

Saliency = Literal["snip", "synflow"]


@dataclass(frozen=True)
class Tcet(Proxy):
    """Sum over layers of log(sum of s / std of s) * log det K.

    s is the saliency of every weight of the layer, and the deviation that of a sample (n - 1). K[m, n] is the number of
    positions at which the layer's output, before any activation, has the same sign (> 0) for samples m and n: NWOT's
    kernel of that layer alone. The determinant is in float64. A layer used several times has the positions of all uses
    (of the first, where capture does not cover it).

    As in the code, log det K is 0 where K is singular (two samples agree everywhere, or there are fewer positions than
    tell the samples apart), the deviation is left out where it is 0, and a layer without saliency adds nothing. What
    "singular" is there depends on rounding in float32; here it is that of `log_determinant`.

    The code sums over modules (convolutions and linear layers), here every layer counts, and it takes K in evaluation
    mode, where here batch normalisation keeps its mode. Where samples are coupled, the whole batch is one group.

    Args:
        saliency: "snip": |g * w|, with g the gradient of the batch's mean loss, which the authors search with; or
            "synflow": that of `synaptic_flow`, which their table has too.
    """

    saliency: Saliency = "snip"

    name: ClassVar[str] = "tcet"
    source: ClassVar[str] = "Xiang, Hunter, Xu, Dudziak, Wen, AutoML 2023, after the public code"
    gradient_based: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.saliency not in ("snip", "synflow"):
            raise InputError(f"saliency must be 'snip' or 'synflow', got {self.saliency!r}")

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network.

        Raises UnavailableError where a saliency is not finite or cannot be had (`synaptic_flow`), or samples on a
        layer's output cannot be told apart.
        """
        return math.fsum(_log(ratio) * determinant for ratio, determinant in self._terms(evidence.network))

    def details(self, evidence: Evidence) -> dict[str, float]:
        """Returns the number of layers, and of those whose kernel is singular."""
        terms = self._terms(evidence.network)
        return {"layers": float(len(terms)), "singular": float(sum(determinant == 0 for _, determinant in terms))}

    def _terms(self, network: Network) -> list[tuple[float, float]]:
        """Returns, for each layer, sum over deviation of its saliency, and the log-determinant of its kernel."""
        found: list[tuple[float, float]] = network.once(("terms of T-CET", self.saliency), lambda: self._new(network))
        return found

    def _new(self, network: Network) -> list[tuple[float, float]]:
        ratios = [_ratio(s) for s in (_snip(network) if self.saliency == "snip" else _synflow(network))]
        determinants: list[float] = network.once("determinants of T-CET", lambda: _determinants(network))
        return list(zip(ratios, determinants, strict=True))


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else 0.0


def _snip(network: Network) -> Iterator[Tensor]:
    """Yields |g * w| of the weights of each layer."""
    parameters = network.parameters()
    leaves = {layer.name: parameters[layer.name].detach().requires_grad_() for layer in network.plan.layers}
    loss = network.losses(network.run(network.images, leaves)).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for weight, gradient in zip(leaves.values(), gradients, strict=True):
        weight = weight.detach()
        yield torch.zeros_like(weight) if gradient is None else (gradient.float() * weight.float()).abs()


def _synflow(network: Network) -> Iterator[Tensor]:
    """Yields |dR / dw * w| of the weights of each layer."""
    names = [layer.name for layer in network.plan.layers]
    flow = synaptic_flow(network, names)
    for name in names:
        yield (flow.weights[name] * flow.gradients[name]).abs()


def _ratio(saliency: Tensor) -> float:
    """Returns the sum of a layer's saliency over its deviation; the sum where that is 0."""
    saliency = saliency.double().flatten()
    total = float(saliency.sum())
    if not math.isfinite(total):
        raise UnavailableError("the saliency of a weight is not finite")
    deviation = float(saliency.std()) if len(saliency) > 1 else 0.0
    return total / deviation if deviation > 0 else total


def _determinants(network: Network) -> list[float]:
    return [_layer_determinant(words, len(network.images)) for words in _output_signs(network)]


def _layer_determinant(words: list[Tensor], samples: int) -> float:
    """Returns log det K of the agreements of packed signs, 0 where K is singular."""
    return (log_determinant(hamming_kernel(words, samples)) or 0.0) if words else 0.0


def _output_signs(network: Network) -> list[list[Tensor]]:
    """Returns, for each layer, the packed signs of the outputs of its uses.

    One forward pass gives them where samples are coupled, or where it is known which axis of every output holds them;
    else there is a pass a sample.
    """
    plan, images = network.plan, network.images
    # What capture does not cover has no list of calls.
    calls = [layer.calls or [layer.first_call] for layer in plan.layers]
    names = {call: layer.name for layer, of_layer in zip(plan.layers, calls, strict=True) for call in of_layer}
    signs = _OutputSigns(plan, names, len(images))
    if plan.coupled is not None or all(isinstance(plan.actions[call], Use) for call in signs.calls):
        signs.run(network, images, 0)
    else:
        for n in range(len(images)):
            signs.run(network, images[n : n + 1], n)
    return [[signs.words[call] for call in of_layer if call in signs.words] for of_layer in calls]


class _OutputSigns(TorchFunctionMode):
    """Packs the signs of what layers put out, call by call of the plan."""

    def __init__(self, plan: Plan, names: dict[int, str], samples: int) -> None:
        super().__init__()
        self.calls = {call: name for call, name in names.items() if call < len(plan.actions)}
        self.words: dict[int, Tensor] = {}
        self._plan = plan
        self._samples = samples
        self._first = 0
        self._batch = 0
        self._next = 0

    def run(self, network: Network, images: Tensor, first: int) -> None:
        """Runs the network on the samples from `first` on."""
        self._first, self._batch, self._next = first, len(images), 0
        with torch.no_grad(), self:
            network.run(images)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func`; packs the signs of its result where it is the output of a layer."""
        kwargs = kwargs or {}
        kind = fn.kind_of(func, args, kwargs)
        if kind is None or kind in fn.UNPLANNED:
            return func(*args, **kwargs)
        if kind is Kind.COMPOSITE:
            with self:
                return fn.run_body(func, args, kwargs)
        call = self._next
        self._next += 1
        out = func(*args, **kwargs)
        if call in self.calls:
            self._pack(call, fn.tensors_in(out)[0])
        return out

    def _pack(self, call: int, output: Tensor) -> None:
        rows = output.reshape(1, -1) if self._batch == 1 < self._samples else self._by_sample(call, output)
        self.words[call] = pack_signs(rows, words=self.words.get(call), first_sample=self._first)

    def _by_sample(self, call: int, output: Tensor) -> Tensor:
        action = self._plan.actions[call]
        use = action if isinstance(action, Use) else self._plan.observed.get(call)
        if use is None:
            raise UnavailableError(
                f"the output of {self.calls[call]} is {list(output.shape)}, and which axis holds the samples is unknown"
            )
        # The axis is that of the product with its weight on the right.
        return use.axis.split(output if use.weight_on_right else output.transpose(-1, -2), self._batch)
