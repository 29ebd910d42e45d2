"""The pass that SynFlow and DSS share: a network of positive parameters on one image of ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..capture.functions import KINDS, Kind, tensors_in
from .attention_weights import attention_weights
from .network import Network
from .proxy import UnavailableError


@dataclass(frozen=True)
class SynapticFlow:
    """Of R = the sum of the outputs for one image of ones, every parameter replaced by its absolute value."""

    weights: Mapping[str, Tensor]  # |w|, float64
    gradients: Mapping[str, Tensor]  # dR / d|w|, float64; 0 where R does not depend on the weight
    attention: frozenset[str]  # the weights next to an attention product

    def saliency(self, name: str) -> Tensor:
        """Returns the sum over a weight's entries of |w * dR/dw|."""
        return (self.weights[name] * self.gradients[name]).abs().sum()


class _WithoutBatchNorm(TorchFunctionMode):
    """Hands on the input of every batch normalisation as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if KINDS.get(func) is Kind.BATCH_NORM:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def synaptic_flow(network: Network, names: Sequence[str]) -> SynapticFlow:
    """Returns the flow through the weights of these names, computed once a network, in float64.

    Batch normalisation is bypassed, as in the public code of SynFlow; every other operation is the network's own.
    Layer normalisation stays, with its scale and shift positive, and so do GELU and its kin, so that in a transformer R
    is no longer the sum over all paths: layer normalisation hands on negative values too. R sums every entry of the
    output, or of the first tensor in it. Buffers are left as they are, where the code makes those positive too.
    """
    found: SynapticFlow = network.once(("synaptic flow", *names), lambda: _flow(network, names))
    return found


def _flow(network: Network, names: Sequence[str]) -> SynapticFlow:
    dtype = torch.float64
    positive = {n: p.abs().to(dtype) for n, p in network.parameters(dtype).items() if p.is_floating_point()}
    weights = {name: positive[name].requires_grad_() for name in names}
    # The image requires a gradient only to mark in the graph what was computed from it.
    image = torch.ones_like(network.images[:1], dtype=dtype).requires_grad_()
    try:
        with _WithoutBatchNorm():
            output = network.run(image, positive, dtype=dtype)
    except RuntimeError as error:
        raise UnavailableError(f"the model does not run on an image of ones in float64: {error}") from error
    outputs = [t for t in tensors_in(getattr(output, "logits", output)) if t.grad_fn is not None]
    if not outputs:
        raise UnavailableError("no tensor of the output depends on the weights through differentiable operations")
    total = outputs[0].sum()
    gradients = torch.autograd.grad(total, list(weights.values()), retain_graph=True, materialize_grads=True)
    return SynapticFlow(
        weights={name: weight.detach() for name, weight in weights.items()},
        gradients=dict(zip(names, gradients, strict=True)),
        attention=attention_weights(total, weights, image),
    )
