"""The definitions that proxies are held to: float64, obvious loops, nothing of this package beneath.

Each function takes a plain module and images and labels, or the gradients or Jacobian that it reduces, and names
weights as `model.named_parameters()` does. Models are copied, never changed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def input_jacobian(model: nn.Module, images: Tensor) -> Tensor:
    """Returns [S, values]: row n is the gradient at image n of the sum of all logits of the batch."""
    twin = copy.deepcopy(model).double()
    coupled = any(isinstance(m, _BatchNorm) and m.training for m in twin.modules())
    rows = []
    for batch in [images] if coupled else torch.split(images, 1):
        leaf = batch.double().clone().requires_grad_()
        output = twin(leaf)
        logits = output[0] if isinstance(output, tuple) else output
        (gradient,) = torch.autograd.grad(logits.sum(), leaf)
        rows.append(gradient.flatten(1))
    return torch.cat(rows)


def jacov(jacobian: Tensor) -> float:
    """Returns - sum of log(v + k) + 1 / (v + k) over the eigenvalues v of the rows' correlations, k = 1e-5."""
    eigenvalues = np.linalg.eigvals(np.corrcoef(jacobian.double().numpy())).real
    return -math.fsum(math.log(v + 1e-5) + 1 / (v + 1e-5) for v in eigenvalues)


def epe_nas(jacobian: Tensor, labels: Tensor, classes: int) -> float:
    """Returns the score of EPE-NAS (Lopes et al., ICANN 2021), pairs of classes counted twice as its code does."""
    sums = []
    for label in sorted(set(labels.tolist())):
        rows = jacobian[labels == label].double().numpy()
        correlations: NDArray[np.float64] = np.atleast_2d(np.corrcoef(rows))
        total = sum(math.log(abs(r) + 1e-5) for r in correlations.flatten())
        if classes <= 100:
            sums.append(total)
        elif len(rows) > 1:
            sums.append(total / len(rows))
    if classes <= 100:
        return sum(abs(e) for e in sums)
    return sum(abs(e - other) for e in sums for other in sums) / len(sums)


def weight_gradients(model: nn.Module, images: Tensor, labels: Tensor, weights: Sequence[str]) -> dict[str, Tensor]:
    """Returns the gradient of the mean cross-entropy of the batch at each weight, in float64."""
    twin = copy.deepcopy(model).double()
    leaves = [twin.get_parameter(name) for name in weights]
    output = twin(images.double())
    loss = F.cross_entropy(output[0] if isinstance(output, tuple) else output, labels)
    return dict(zip(weights, torch.autograd.grad(loss, leaves, materialize_grads=True), strict=True))


def grasp(model: nn.Module, images: Tensor, labels: Tensor, gradients: Mapping[str, Tensor]) -> float:
    """Returns - sum of w * (H g), H g by central differences of the gradient along the given gradients g."""
    length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    step = 1e-6 / length
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(model).double()
        with torch.no_grad():
            for name, g in gradients.items():
                moved.get_parameter(name).add_(g.double(), alpha=sign * step)
        sides.append(weight_gradients(moved, images, labels, list(gradients)))
    total = 0.0
    for name in gradients:
        product = (sides[0][name] - sides[1][name]) / (2 * step)
        total -= float((model.get_parameter(name).detach().double() * product).sum())
    return total


def synaptic_flow(
    model: nn.Module, shape: Sequence[int], weights: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns |w| and dR / d|w| of each weight, R the sum of the outputs for one image [*shape] of ones.

    Every parameter is replaced by its absolute value, and every batch normalisation by the identity.
    """
    twin = copy.deepcopy(model).double().eval()
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, nn.Identity())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
    leaves = [twin.get_parameter(name) for name in weights]
    output = twin(torch.ones(1, *shape, dtype=torch.float64))
    total = (output[0] if isinstance(output, tuple) else output).sum()
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    values = [leaf.detach() for leaf in leaves]
    return dict(zip(weights, values, strict=True)), dict(zip(weights, gradients, strict=True))


def synflow(model: nn.Module, shape: Sequence[int], weights: Sequence[str]) -> float:
    """Returns the logarithm of the sum over the weights of |w * dR/dw| (Tanaka et al., NeurIPS 2020)."""
    values, gradients = synaptic_flow(model, shape, weights)
    return math.log(sum(float((values[name] * gradients[name]).abs().sum()) for name in weights))


def dss(model: nn.Module, shape: Sequence[int], attention: Sequence[str], others: Sequence[str]) -> float:
    """Returns the score of TF-TAS (Zhou et al., CVPR 2022), given which matrices are of attention and which count."""
    values, gradients = synaptic_flow(model, shape, [*attention, *others])
    diversity = 0.0
    for name in attention:
        norms = [float(np.linalg.norm(matrix[name].numpy(), "nuc")) for matrix in (values, gradients)]
        diversity += norms[0] * norms[1]
    return diversity + sum(float((values[name] * gradients[name]).abs().sum()) for name in others)


def zen(
    model: nn.Module,
    features: Callable[[nn.Module, Tensor], Tensor],
    weights: Mapping[str, Tensor],
    images: Tensor,
    noise: Tensor,
    gamma: float,
) -> float:
    """Returns the Zen-score as its public code has it, for weights, images and noise drawn from N(0, 1).

    `features(model, images)` are those before global pooling. Batch normalisation is reset and in training mode; its
    running variances after both passes are read, averaged over the channels.
    """
    twin = copy.deepcopy(model).double()
    norms = [m for m in twin.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        for name, value in weights.items():
            twin.get_parameter(name).copy_(value)
            bias = dict(twin.named_parameters()).get(name.removesuffix("weight") + "bias")
            if bias is not None:
                bias.zero_()
        for norm in norms:
            norm.reset_running_stats()
            norm.reset_parameters()
            norm.train()
        moved = features(twin, images.double()) - features(twin, images.double() + gamma * noise.double())
    distance = sum(float(sample.abs().sum()) for sample in moved) / len(moved)
    variances = [norm.running_var for norm in norms]
    return math.log(distance) + sum(math.log(math.sqrt(float(v.mean()))) for v in variances if v is not None)
