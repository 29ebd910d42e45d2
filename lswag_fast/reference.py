"""The definitions that every kernel is held to: float64, one sample after the other, autograd, nothing of ours beneath.

L-SWAG is Casarin, Escalera, Lanz, CVPR 2025 (arXiv 2505.07300); "equation" below means theirs. Dead weights, the
numbering of layers by Parameters, and the percentile of an activation are conventions of this project, defined here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

Loss = Callable[[Any, Tensor], Tensor]

DEAD = 2.0**-22
"""A weight is dead when sigma <= DEAD * mean|g|, as when all its gradients are 0: rounding alone made its sigma."""

_ACTIVATIONS = frozenset(
    [F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.gelu, F.silu, F.hardswish]
)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Moments:
    """The statistics of one layer's group gradients, over the groups: maps of the layer's shape, and their sums."""

    numel: int
    dead: Tensor  # bool
    sigma: Tensor
    mean_abs: Tensor
    log_sum_inverse_sigma: float | None  # log(sum of 1 / sigma) over the weights alive; None: all are dead
    log_sum_mean_over_sigma: float | None


@dataclass(frozen=True)
class Score:
    """L-SWAG of one network, its factors, and what they are made of; `moments` has a row a layer."""

    lswag: float
    trainability: float  # Lambda, equation 6
    expressivity: int  # Psi, equation 7
    parameters: tuple[str, ...]  # the layers, by first use
    percentiles: tuple[int, ...]
    moments: tuple[Moments, ...]
    activation_percentiles: tuple[int, ...]
    patterns_by_activation: tuple[int, ...]
    positions: int  # of the activations that Psi counts


def moments_of(gradients: Sequence[Tensor]) -> Moments:
    """Returns the moments of |g| over the groups, from one gradient a group (equations 1 and 4, population sigma)."""
    magnitudes = torch.stack([g.double().abs() for g in gradients])
    mean = magnitudes.mean(0)
    sigma = (magnitudes - mean).square().mean(0).sqrt()
    dead = (mean == 0) | (sigma <= DEAD * mean)
    alive = ~dead
    return Moments(
        numel=mean.numel(),
        dead=dead,
        sigma=sigma,
        mean_abs=mean,
        log_sum_inverse_sigma=_log_sum(1 / sigma[alive]),
        log_sum_mean_over_sigma=_log_sum(mean[alive] / sigma[alive]),
    )


def gradient_moments(inputs: Tensor, output_grads: Tensor, groups: int) -> Moments:
    """Returns the moments of a linear layer's weight gradients.

    inputs [S, T, I] and output_grads [S, T, O] are a and d; group k's gradient is (1/|k|) * sum of d_n^T a_n, [O, I],
    over its S / groups consecutive samples.
    """
    inputs, output_grads = inputs.double(), output_grads.double()
    return moments_of(
        [torch.stack([output_grads[n].T @ inputs[n] for n in group]).mean(0) for group in _groups(len(inputs), groups)]
    )


def group_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, groups: int, parameters: Sequence[str], loss: Loss | None = None
) -> dict[str, list[Tensor]]:
    """Returns, for each named Parameter, the gradient of the mean loss over each group, in float64."""
    twin = _float64_twin(model)
    return _run(twin, images, labels, groups, _named(twin, parameters), loss).gradients


def activation_signs(model: nn.Module, images: Tensor, labels: Tensor, groups: int) -> list[Tensor]:
    """Returns bool [S, positions] of each activation in the order of its call: where its value is > 0."""
    return _run(_float64_twin(model), images, labels, groups, {}, None).signs


def pattern_words(activation: Tensor) -> list[bytes]:
    """Returns the pattern of each position of an activation [S, ...]: S bits, bit n set where sample n is > 0."""
    bits = (activation > 0).reshape(len(activation), -1).T.contiguous().numpy()
    return [row.tobytes() for row in np.packbits(bits, axis=1, bitorder="little")]


def activation_patterns(activations: Sequence[Tensor]) -> tuple[int, tuple[int, ...]]:
    """Returns the number of distinct patterns of all activations [S, ...] together, and of each alone."""
    sets = [set(pattern_words(a)) for a in activations]
    return len(set().union(*sets)), tuple(len(s) for s in sets)


def hamming_kernel(activations: Sequence[Tensor]) -> Tensor:
    """Returns the kernel matrix of NWOT (Mellor et al., ICML 2021): positions at which two samples agree, int64 [S, S].

    That is the number of positions less the Hamming distance of the two samples' codes, so the diagonal holds the
    number of positions.
    """
    codes = torch.cat([(a > 0).flatten(1) for a in activations], dim=1).long()
    return codes @ codes.T + (1 - codes) @ (1 - codes).T


def percentile(layer: int, layers: int) -> int:
    """Returns the depth percentile of layer l of L, l from 1 (equation 6); 0 for what comes before every layer."""
    return 10 * int((layer / layers * 100) // 10)


def in_window(depth: int, window: tuple[int, int]) -> bool:
    """Tells whether a percentile lies in the window, both ends included."""
    return window[0] <= depth <= window[1]


def samples_are_coupled(model: nn.Module) -> bool:
    """Tells whether a sample's output depends on the others: BatchNorm that normalises with the batch's statistics."""
    return any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in model.modules())


def lswag(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    parameters: Sequence[str] | None = None,
    groups: int | None = None,
    loss: Loss | None = None,
    window: tuple[int, int] = (0, 100),
    pooling: str = "union",
    pattern_samples: int | None = None,
    numerator: str = "one",
    patterns_inside_window: bool = False,
) -> Score:
    """Returns the L-SWAG score of a model, which is left as it was.

    Args:
        model: any module; activations are the ReLU, ReLU6, GELU, SiLU and Hardswish of torch that it calls.
        images: [S, ...].
        labels: [S, ...], as the loss takes them.
        parameters: the layers by first use; None: the weights of Linear and Conv modules in the order of first use.
        groups: G; None: S, or 2 where samples are coupled. Coupled groups run a pass each, in which axis 0 of every
            activation is the group's; elsewhere every sample runs alone.
        loss: (output, labels) to one loss a sample; None: cross-entropy.
        window: first and last percentile of depth of Lambda; Psi counts up to the last (equation 7).
        pooling: "union" of the patterns of all activations, or "sum" of the counts.
        pattern_samples: patterns over the first so many samples only.
        numerator: "one" (equation 1) or "mean" (ZiCo's term).
        patterns_inside_window: count patterns from the window's first percentile on.
    """
    twin = _float64_twin(model)
    coupled = samples_are_coupled(twin)
    if groups is None:
        groups = 2 if coupled else len(images)
    weights = [f"{name}.weight".lstrip(".") for name, m in twin.named_modules() if isinstance(m, _LAYERS)]
    layers = _named(twin, weights if parameters is None else parameters)
    run = _run(twin, images, labels, groups, layers, loss)
    parameters = list(dict.fromkeys(run.uses) if parameters is None else layers)
    depths = tuple(percentile(number, len(parameters)) for number in range(1, len(parameters) + 1))
    moments = tuple(moments_of(run.gradients[name]) for name in parameters)
    terms = [m.log_sum_inverse_sigma if numerator == "one" else m.log_sum_mean_over_sigma for m in moments]
    trainability = sum(t for t, d in zip(terms, depths, strict=True) if t is not None and in_window(d, window))
    activation_depths = tuple(depths[parameters.index(name)] if name else 0 for name in run.layer_before)
    counted = window if patterns_inside_window else (0, window[1])
    signs = [s for s, d in zip(run.signs, activation_depths, strict=True) if in_window(d, counted)]
    activations = [s[:pattern_samples] for s in signs]
    union, by_activation = activation_patterns(activations)
    expressivity = union if pooling == "union" else sum(by_activation)
    return Score(
        lswag=trainability * expressivity,
        trainability=trainability,
        expressivity=expressivity,
        parameters=tuple(parameters),
        percentiles=depths,
        moments=moments,
        activation_percentiles=activation_depths,
        patterns_by_activation=by_activation,
        positions=sum(a[0].numel() for a in activations),
    )


@dataclass(frozen=True)
class _Run:
    """What the passes over all groups gave."""

    gradients: dict[str, list[Tensor]]  # by name, one a group
    signs: list[Tensor]  # one an activation in the order of its call: bool [S, positions]
    layer_before: list[str]  # of each activation: the layer used last before it, or ""
    uses: list[str]  # layers in the order of use


class _Watch(TorchFunctionMode):
    """Notes the uses of layers and the signs of activations, in their order, during one pass."""

    def __init__(self, layers: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in layers.items()}
        self.uses: list[str] = []
        self.signs: list[Tensor] = []
        self.layer_before: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Reading an attribute (shape, dtype) is no use of a weight; it arrives here as a call of __get__.
        if getattr(func, "__name__", "") != "__get__" or getattr(func, "__self__", None) in (Tensor.T, Tensor.mT):
            operands = chain.from_iterable(
                a if isinstance(a, (list, tuple)) else [a] for a in (*args, *kwargs.values())
            )
            self.uses += [self.names[id(a)] for a in operands if id(a) in self.names]
        result = func(*args, **kwargs)
        # nn.ReLU6 calls hardtanh with the limits 0 and 6.
        relu6 = func is F.hardtanh and kwargs.get("min_val") == 0
        if func in _ACTIVATIONS or relu6:
            self.signs.append((result > 0).detach().clone())
            self.layer_before.append(self.uses[-1] if self.uses else "")
        return result


def _run(
    twin: nn.Module,
    images: Tensor,
    labels: Tensor,
    groups: int,
    layers: dict[str, nn.Parameter],
    loss: Loss | None,
) -> _Run:
    coupled = samples_are_coupled(twin)
    images = images.double() if images.is_floating_point() else images
    labels = labels.double() if labels.is_floating_point() else labels
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in layers)
    gradients: dict[str, list[Tensor]] = {name: [] for name in layers}
    signs: list[list[Tensor]] = []
    for group in _groups(len(images), groups):
        passes = [group] if coupled else [range(n, n + 1) for n in group]
        total = {name: torch.zeros_like(p) for name, p in layers.items()}
        for samples in passes:
            chosen = slice(samples.start, samples.stop)
            with _Watch(layers) as watch:
                losses = (loss or _cross_entropy)(twin(images[chosen]), labels[chosen])
            for name, g in zip(layers, _gradients(losses.mean(), layers), strict=True):
                total[name] += g / len(passes)
            signs.append([s.reshape(len(samples), -1) for s in watch.signs])
        for name, g in total.items():
            gradients[name].append(g)
    joined = [torch.cat(parts) for parts in zip(*signs, strict=True)]
    return _Run(gradients, joined, watch.layer_before, watch.uses)


def _gradients(loss: Tensor, layers: dict[str, nn.Parameter]) -> Iterator[Tensor]:
    if not layers:
        return iter(())
    found = torch.autograd.grad(loss, list(layers.values()), allow_unused=True)
    return (torch.zeros_like(p) if g is None else g for p, g in zip(layers.values(), found, strict=True))


def _float64_twin(model: nn.Module) -> nn.Module:
    """Returns a float64 copy that drops nothing at random; norms keep their mode."""
    twin = copy.deepcopy(model).double()
    modes = [(m, m.training) for m in twin.modules() if isinstance(m, _NormBase)]
    twin.eval()
    for norm, mode in modes:
        norm.train(mode)
    return twin


def _named(twin: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Returns the Parameters of these names; of a tied one, which has several, the first name is kept."""
    first_names = {id(twin.get_parameter(name)): name for name in reversed(names)}
    return {name: twin.get_parameter(name) for name in names if name in first_names.values()}


def _groups(samples: int, groups: int) -> list[range]:
    size = samples // groups
    return [range(k * size, (k + 1) * size) for k in range(groups)]


def _cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels, reduction="none")


def _log_sum(terms: Tensor) -> float | None:
    return float(terms.sum().log()) if terms.numel() else None
