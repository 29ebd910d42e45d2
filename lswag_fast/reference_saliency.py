"""Definitions of the proxies that share L-SWAG's pass: float64, autograd, nothing of ours beneath; see `reference`.

Where samples are coupled, each group is a batch of its own; the gradient of "the batch" is the mean of the groups'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .reference import (
    _LAYERS,
    DEAD,
    _cross_entropy,
    _float64_twin,
    _groups,
    activation_patterns,
    group_gradients,
    moments_of,
    samples_are_coupled,
)


def zico(model: nn.Module, images: Tensor, labels: Tensor, groups: int, parameters: Sequence[str]) -> float:
    """Returns the sum over layers of log(sum over live weights of mean|g| / sigma)."""
    found = group_gradients(model, images, labels, groups, parameters)
    terms = [moments_of(g).log_sum_mean_over_sigma for g in found.values()]
    return sum(term for term in terms if term is not None)


def gradsign(model: nn.Module, images: Tensor, labels: Tensor, groups: int, parameters: Sequence[str]) -> float:
    """Returns the sum over weights of |sum over groups of sign(g)|."""
    found = group_gradients(model, images, labels, groups, parameters)
    return sum(float(torch.stack(g).sign().sum(0).abs().sum()) for g in found.values())


def gsnr(model: nn.Module, images: Tensor, labels: Tensor, groups: int, parameters: Sequence[str]) -> float:
    """Returns the sum over weights with a deviation above rounding of (mean of g)^2 / variance of g."""
    total = 0.0
    for gradients in group_gradients(model, images, labels, groups, parameters).values():
        g = torch.stack(gradients)
        mean, variance = g.mean(0), g.var(0, unbiased=False)
        live = (variance > 0) & (variance.sqrt() > DEAD * mean.abs())
        total += float((mean[live].square() / variance[live]).sum())
    return total


def grad_norm(model: nn.Module, images: Tensor, labels: Tensor, groups: int, parameters: Sequence[str]) -> float:
    """Returns the sum over layers of the norm of the batch's gradient."""
    return sum(float(g.norm()) for g in batch_gradients(model, images, labels, groups, parameters).values())


def plain(model: nn.Module, images: Tensor, labels: Tensor, groups: int, parameters: Sequence[str]) -> float:
    """Returns the sum over weights of g * w."""
    found = batch_gradients(model, images, labels, groups, parameters)
    return sum(float((g * model.get_parameter(name).detach().double()).sum()) for name, g in found.items())


def snip(model: nn.Module, images: Tensor, labels: Tensor, groups: int, parameters: Sequence[str]) -> float:
    """Returns the sum over weights of |g * w|."""
    found = batch_gradients(model, images, labels, groups, parameters)
    return sum(float((g * model.get_parameter(name).detach().double()).abs().sum()) for name, g in found.items())


def l2_norm(model: nn.Module, parameters: Sequence[str]) -> float:
    """Returns the sum over layers of the norm of the weight."""
    return sum(float(model.get_parameter(name).detach().double().norm()) for name in parameters)


def batch_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, groups: int, parameters: Sequence[str]
) -> dict[str, Tensor]:
    """Returns, for each named Parameter, the gradient of the batch's mean loss, in float64."""
    found = group_gradients(model, images, labels, groups, parameters)
    return {name: torch.stack(g).mean(0) for name, g in found.items()}


def fisher(model: nn.Module, images: Tensor, labels: Tensor, groups: int) -> float:
    """Returns the sum over Linear and Conv modules, channels c and calls of 0.5 * mean_n (sum over positions y * d)^2.

    d is the gradient at the output y of the mean loss of the batch (of the group, where samples are coupled). Outputs
    have their samples first; channels are axis 1 of convolutions and the last axis of linear maps.
    """
    twin = _float64_twin(model)
    batches = _groups(len(images), groups) if samples_are_coupled(twin) else [range(len(images))]
    total = 0.0
    for batch in batches:
        chosen = slice(batch.start, batch.stop)
        outputs, loss = _layer_outputs(twin, images[chosen].double(), labels[chosen])
        gradients = torch.autograd.grad(loss, [out for out, _ in outputs])
        for (out, channel), grad in zip(outputs, gradients, strict=True):
            for y, d in zip(out, grad, strict=True):
                by_channel = (y * d).movedim(channel - 1, 0).reshape(out.shape[channel], -1).sum(1)
                total += 0.5 * float(by_channel.detach().square().sum()) / len(batch) / len(batches)
    return total


def _layer_outputs(twin: nn.Module, images: Tensor, labels: Tensor) -> tuple[list[tuple[Tensor, int]], Tensor]:
    """Returns the outputs of all Linear and Conv modules with their channel axes, and the mean loss."""
    outputs: list[tuple[Tensor, int]] = []

    def note(module: nn.Module, _: object, out: Tensor) -> Tensor:
        outputs.append((out, out.dim() - 1 if isinstance(module, nn.Linear) else 1))
        return out.clone()  # what follows may work in place

    hooks = [m.register_forward_hook(note) for m in twin.modules() if isinstance(m, _LAYERS)]
    loss = _cross_entropy(twin(images), labels).mean()
    for hook in hooks:
        hook.remove()
    return outputs, loss


def nwot(activations: Sequence[Tensor]) -> float:
    """Returns log |det K| of post-activations [S, ...], K the positions at which two samples agree in sign."""
    samples = len(activations[0])
    kernel = torch.zeros(samples, samples, dtype=torch.float64)
    for m in range(samples):
        for n in range(samples):
            kernel[m, n] = sum(int(((a[m] > 0) == (a[n] > 0)).sum()) for a in activations)
    return float(torch.linalg.slogdet(kernel)[1])


def regularised_swap(activations: Sequence[Tensor], parameters: int, mu: float, sigma: float) -> float:
    """Returns the number of distinct patterns of post-activations [S, ...], times exp(-(P / 1000 - mu)^2 / sigma)."""
    return activation_patterns(activations)[0] * math.exp(-((parameters / 1000 - mu) ** 2) / sigma)


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Returns the multiply-adds of one image [...]: those of every matrix product and convolution that torch runs."""
    twin = _float64_twin(model).eval()
    with sdpa_kernel(SDPBackend.MATH), _Products() as products:
        twin(image[None].double())
    return int(products.count)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts multiply-adds, operation by operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.count += out.numel() * args[0].shape[-1]
        elif name.rstrip("_") in ("addmm", "baddbmm"):
            self.count += out.numel() * args[1].shape[-1]
        elif name == "convolution":
            self.count += out.numel() * args[1][0].numel()  # a kernel [O, I / groups, ...]
        return out
