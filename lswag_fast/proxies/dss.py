"""DSS: synaptic diversity of attention plus synaptic saliency of all other linear maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .evidence import Evidence
from .proxy import Proxy, UnavailableError, finite
from .synaptic_flow import SynapticFlow, synaptic_flow


@dataclass(frozen=True)
class Dss(Proxy):
    """Sum over the weights W of attention of |dR/dW|_* |W|_*, plus that over other matrices of the sum of |w * dR/dw|.

    |.|_* is the nuclear norm, the sum of the singular values, and R is SynFlow's: the sum of the outputs for an image
    of ones, every parameter replaced by its absolute value; layer normalisation stays. Paper: equations 5 to 8.

    The paper sums the attention and MLP modules; its code (TF-TAS, for AutoFormer) adds the classification head, and
    leaves out the patch embedding, and so does this: matrices count, and kernels of convolutions only where they are of
    attention. The code tells attention by its names and by square supernet weights; here a weight is of attention
    where no other weight lies between it and a product of two tensors that depend on the image. The code counts the
    head twice where there are 1000 classes, and computes in float32; here it counts once, in float64. Queries, keys
    and values projected by one matrix are one matrix, by three are three, as in the code.
    """

    name: ClassVar[str] = "dss"
    source: ClassVar[str] = "Zhou, Sheng, Zheng, Li, Sun, Tian, Chen, Ji, CVPR 2022, equations 5 to 8"
    gradient_based: ClassVar[bool] = True

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network. Raises UnavailableError where it has no attention, or does not run."""
        parts = self.details(evidence)
        return finite(parts["diversity"] + parts["saliency"], "a parameter is not finite, or the flow overflows")

    def details(self, evidence: Evidence) -> dict[str, float]:
        """Returns `diversity`, the sum over attention, and `saliency`, the sum over the other matrices."""
        network, names = evidence.network, tuple(layer.name for layer in evidence.layers)
        flow = synaptic_flow(network, names)
        if not flow.attention:
            raise UnavailableError("it is defined on transformers, and no product of two activations was found")
        found: dict[str, float] = network.once(("dss", names), lambda: _parts(flow))
        return found


def _parts(flow: SynapticFlow) -> dict[str, float]:
    weights = flow.weights
    # In the order of the weights, that the same network has the same bits.
    attention = [name for name in weights if name in flow.attention]
    others = [name for name, weight in weights.items() if name not in flow.attention and weight.dim() == 2]
    diversity = sum(_nuclear_norm(weights[name]) * _nuclear_norm(flow.gradients[name]) for name in attention)
    return {"diversity": float(diversity), "saliency": float(sum(flow.saliency(name) for name in others))}


def _nuclear_norm(weight: Tensor) -> Tensor:
    if not bool(torch.isfinite(weight).all()):
        return weight.new_tensor(torch.nan)
    norm: Tensor = torch.linalg.svdvals(weight.flatten(1)).sum()
    return norm
