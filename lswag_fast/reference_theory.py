"""The definitions of TE-NAS, AZ-NAS and T-CET as plain as they come: float64, loops, autograd, nothing of ours beneath.

Every function takes a plain module, which is left as it was; layers are the weights of its Linear and convolution
modules, whose every call runs through the module. Samples run alone, but for batch normalisation in training mode.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from .reference import samples_are_coupled

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish)


def linear_regions(model: nn.Module, images: Tensor) -> int:
    """Returns the number of distinct rows of signs, over all activation modules, among images [S, ...]."""
    outputs = _outputs(model, images, _ACTIVATIONS)
    patterns = {tuple((torch.cat([output[n] for output in outputs.values()]) > 0).tolist()) for n in range(len(images))}
    return len(patterns)


def logit_gradients(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Returns, for each sample, the gradient [P] of the sum of its logits with respect to all layers' weights."""
    twin = _twin(model, dtype)
    weights = [m.weight for m in twin.modules() if isinstance(m, _LAYERS)]
    coupled = samples_are_coupled(twin)
    gradients = []
    for n in range(len(images)):
        logits = twin(images.to(dtype))[n] if coupled else twin(images[n : n + 1].to(dtype))
        found = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
        flat = [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]
        gradients.append(torch.cat([g.flatten() for g in flat]))
    return gradients


def tangent_kernel(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the kernel [S, S] of inner products of gradients [P], in float64."""
    kernel = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for m, left in enumerate(gradients):
        for n, right in enumerate(gradients):
            kernel[m, n] = left.double() @ right.double()
    return kernel


def condition_number(kernel: Tensor) -> float:
    """Returns the largest over the smallest eigenvalue of a symmetric matrix."""
    eigenvalues = torch.linalg.eigvalsh(kernel.double())
    return float(eigenvalues.max() / eigenvalues.min())


def block_features(model: nn.Module, images: Tensor, blocks: Sequence[str]) -> list[Tensor]:
    """Returns what goes into the first of the named modules and what comes out of each, on one float64 graph."""
    twin = _twin(model, torch.float64)
    features: list[Tensor] = []
    first = twin.get_submodule(blocks[0])
    first.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    for name in blocks:
        twin.get_submodule(name).register_forward_hook(lambda module, args, output: features.append(output))
    twin(images.double().requires_grad_())
    return features


def entropy(feature: Tensor) -> float:
    """Returns the entropy of the principal components of a feature [S, C, H, W] or [S, T, C] (AZ-NAS, equation 3)."""
    channels_last = feature.movedim(1, -1) if feature.dim() == 4 else feature
    points = channels_last.reshape(-1, channels_last.shape[-1]).detach()
    mean = sum(points) / len(points)
    covariance = sum(torch.outer(x - mean, x - mean) for x in points) / len(points)
    eigenvalues = torch.linalg.svdvals(covariance)
    shares = [float(e / eigenvalues.sum()) for e in eigenvalues]
    return -sum(p * math.log(p + 1e-8) for p in shares)


def expressivity(features: Sequence[Tensor]) -> float:
    """Returns AZ-NAS's expressivity (equation 4)."""
    return sum(entropy(f) for f in features)


def progressivity(features: Sequence[Tensor]) -> float:
    """Returns AZ-NAS's progressivity (equation 5)."""
    entropies = [entropy(f) for f in features]
    return min(entropies[i] - entropies[i - 1] for i in range(1, len(entropies)))


def trainability(features: Sequence[Tensor], seed: int) -> float:
    """Returns AZ-NAS's trainability (equations 6 to 11), with signs drawn from `seed` for the last feature first."""
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for i in range(len(features) - 1, 0, -1):
        after, before = features[i], features[i - 1]
        signs = (2 * torch.randint(2, after.shape, generator=generator) - 1).double()
        (gradient,) = torch.autograd.grad(after, before, signs, retain_graph=True)
        if after.dim() == 4:
            gradient = F.pixel_unshuffle(gradient, before.shape[-1] // after.shape[-1])
            gradient, signs = gradient.movedim(1, -1), signs.movedim(1, -1)
        pulled = gradient.reshape(-1, gradient.shape[-1])
        pushed = signs.reshape(-1, signs.shape[-1])
        jacobian = sum(torch.outer(g, v) for g, v in zip(pulled, pushed, strict=True)) / len(pushed)
        spectral = float(torch.linalg.svdvals(jacobian)[0])
        scores.append(2 - spectral - 1 / (spectral + 1e-6))
    return sum(scores) / len(scores)


def tcet(model: nn.Module, images: Tensor, labels: Tensor, saliency: Mapping[str, Tensor] | None = None) -> float:
    """Returns T-CET: the sum over layers of log(sum of s / deviation of s) * log det K (`proxies/tcet.py`).

    s is `saliency` by name of the weight; None: SNIP's, |g * w|.
    """
    twin = _twin(model, torch.float64)
    F.cross_entropy(twin(images.double()), labels).backward()  # type: ignore[no-untyped-call]
    outputs = _outputs(model, images, _LAYERS)
    total = 0.0
    for name, module in twin.named_modules():
        if not isinstance(module, _LAYERS) or name not in outputs or module.weight.grad is None:
            continue
        snip = (module.weight * module.weight.grad).detach().abs()
        s = snip if saliency is None else saliency[f"{name}.weight"]
        total += math.log(float(s.sum() / s.std())) * _log_determinant(outputs[name])
    return total


def _log_determinant(output: Tensor) -> float:
    """Returns the log-determinant of the positions at which samples agree in sign; 0 where they are not told apart."""
    codes = output > 0
    kernel = torch.zeros(len(codes), len(codes), dtype=torch.float64)
    for m, left in enumerate(codes):
        for n, right in enumerate(codes):
            kernel[m, n] = int((left == right).sum())
    if int(torch.linalg.matrix_rank(kernel)) < len(kernel):
        return 0.0
    return float(torch.linalg.slogdet(kernel).logabsdet)


def _outputs(model: nn.Module, images: Tensor, kinds: tuple[Any, ...]) -> dict[str, Tensor]:
    """Returns what the modules of some kinds give out, by name: [S, values of all calls].

    In float32, so that signs are those of the score.
    """
    twin = _twin(model, torch.float32)
    calls: list[tuple[str, Tensor]] = []
    for name, module in twin.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(
                lambda module, args, output, name=name: calls.append((name, output.detach().clone().flatten(1)))
            )
    rows: dict[str, list[Tensor]] = {}
    for batch in [images] if samples_are_coupled(twin) else torch.split(images, 1):
        calls.clear()
        twin(batch.float())
        for name in dict.fromkeys(name for name, _ in calls):
            rows.setdefault(name, []).append(torch.cat([output for n, output in calls if n == name], dim=1))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns a copy in `dtype` that drops nothing at random; norms keep their mode."""
    twin = copy.deepcopy(model).to(dtype)
    modes = [(m, m.training) for m in twin.modules() if isinstance(m, _NormBase)]
    twin.eval()
    for norm, mode in modes:
        norm.train(mode)
    return twin
