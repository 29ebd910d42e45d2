"""GraSP: what removing each weight would do to the flow of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import backends
from .evidence import Evidence
from .network import Network
from .proxy import Proxy, UnavailableError, finite


@dataclass(frozen=True)
class Grasp(Proxy):
    """Minus the sum over all weights w of w * (H g), g the gradient of the batch's mean loss and H its Hessian.

    g and H are over the weights of the layers alone, and the logits are divided by `temperature` before the loss. The
    paper (equation 8) scores a weight by -w * (H g), removes those of the highest scores, and takes a temperature of
    200. Abdelfattah et al. (ICLR 2021) and NAS-Bench-Suite-Zero sum the scores, with the same sign, which they found to
    rank better, and a temperature of 1; both are taken. Their g and H are of the same images, as here.

    Gradients and products are float32 whatever the dtype of the score, the sum is float64. Batch normalisation by the
    batch makes weights of either sign cancel: on five NAS-Bench-201 cells (S = 32) the conditioning was 120 to 4300 and
    float32 differed from float64 by 4e-5 to 6e-3. Attention is computed by torch's own operations, as fused kernels
    cannot be differentiated twice.

    Attributes:
        temperature: what the logits are divided by; the default loss or one on logits is needed where it is not 1.
    """

    name: ClassVar[str] = "grasp"
    source: ClassVar[str] = "Wang, Zhang, Grosse, ICLR 2020, equation 8"
    gradient_based: ClassVar[bool] = True
    temperature: float = 1.0

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network.

        Raises UnavailableError where the network cannot be differentiated twice, or a gradient is not finite.
        """
        return finite(-self._sums(evidence)[0], "a gradient or a product with the Hessian is not finite")

    def details(self, evidence: Evidence) -> dict[str, float]:
        """Returns `conditioning`: the sum of |w * (H g)| over the absolute value, by which relative errors can grow."""
        total, absolute = self._sums(evidence)
        return {"conditioning": absolute / abs(total) if total else float("inf")}

    def _sums(self, evidence: Evidence) -> tuple[float, float]:
        network, names = evidence.network, tuple(layer.name for layer in evidence.layers)
        key = ("grasp", self.temperature, names)
        found: tuple[float, float] = network.once(key, lambda: self._weighed(network, names))
        return found

    def _weighed(self, network: Network, names: tuple[str, ...]) -> tuple[float, float]:
        """Returns the sums of w * (H g) and of its absolute values."""
        parameters = network.parameters(torch.float32)
        weights = {name: parameters[name].detach().float().requires_grad_() for name in names}
        terms = [
            weight.detach().double() * product.double()
            for weight, product in zip(weights.values(), self._products(network, weights), strict=True)
        ]
        sums = torch.stack([torch.stack((t.sum(), t.abs().sum())) for t in terms]).sum(0)
        return float(sums[0]), float(sums[1])

    def _products(self, network: Network, weights: dict[str, Tensor]) -> list[Tensor]:
        """Returns H g, for each weight."""
        leaves = list(weights.values())
        with backends.preferring("torch"), sdpa_kernel(SDPBackend.MATH):
            output: Any = network.run(network.images.float(), weights, dtype=torch.float32)
            output = output if self.temperature == 1 else network.logits(output) / self.temperature
            loss = network.losses(output).mean()
        try:
            gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
            # The gradient of g . g' for a constant g' = g is H g. Asked for these leaves alone, autograd would not
            # visit, and so not report, operations that are differentiable only once. backward() would visit all, but
            # write to the .grad of leaves of others, such as parameters of the loss.
            aligned = torch.stack([(g.detach() * g).sum() for g in gradients]).sum()
            if not aligned.requires_grad:
                return [torch.zeros_like(leaf) for leaf in leaves]
            products = torch.autograd.grad(aligned, [*leaves, *_leaves(aligned)], materialize_grads=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnavailableError(f"the network cannot be differentiated twice: {error}") from error
        return list(products[: len(leaves)])


def _leaves(output: Tensor) -> list[Tensor]:
    """Returns every leaf of the graph of `output`."""
    seen: set[Any] = set()
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return [node.variable for node in seen if hasattr(node, "variable")]
