"""L-SWAG (Casarin, Escalera, Lanz, CVPR 2025, equations 1, 6, 7, 8): its terms and its window."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..capture import Activation, Layer, Plan
from ..errors import ScoreError
from ..ops.activation_patterns import activate_and_pack, count_patterns_device, pack_signs
from ..ops.gradient_moments import Convolution, GradientMoments, MomentsAccumulator, gradient_moments
from ..ops.gradient_moments_grouped import MomentProblem, PendingMoments, launch_gradient_moments
from ..options import ScoreOptions
from .result import LayerRow, PatternSaturation

SATURATED = 0.95
"""The share of a bound of Psi above which a result says that Psi ranks little but that bound."""


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Returns how often each tensor was written to in place; inference tensors do not say."""
    return [0 if t.is_inference() else t._version for t in tensors]


def percentile(number: int, count: int) -> int:
    """Returns the percentile of depth of layer `number` (from 1) of `count` (equation 6)."""
    return 10 * int((number / count * 100) // 10)


class OperandsChangedError(ScoreError):
    """The model worked in place on a tensor that was kept for the grouped launch; `at_once` keeps none."""


class LswagStatistics:
    """Reduces what one captured pass hands over to the terms of L-SWAG.

    Needs captured: the inputs and output gradients of the weights in the window, and the activations up to its end.
    Reduced to: per weight, the sums over its live entries of 1 / sigma and mu / sigma (equation 6); over all counted
    activations, the number of distinct patterns (equation 7).

    On the CPU a weight is reduced when it comes, its operands still in the cache. On a device all of them wait for one
    grouped launch, unless `at_once`, which needs less memory.
    """

    def __init__(self, plan: Plan, options: ScoreOptions, samples: int, *, at_once: bool = False) -> None:
        assert options.groups is not None
        assert options.pattern_samples is not None
        self._plan = plan
        self._options = options
        self._samples = samples
        self._groups: int = options.groups
        self._pattern_samples: int = options.pattern_samples
        self._moments: dict[str, GradientMoments] = {}
        self._accumulators: dict[str, MomentsAccumulator] = {}
        self._words: dict[int, Tensor] = {}
        self._at_once = at_once
        self._problems: dict[str, MomentProblem] = {}
        self._versions: dict[str, list[int]] = {}
        self._pending = PendingMoments([], [])
        self._counts: Tensor | None = None

    def wants(self, activation: Activation) -> bool:
        """Whether this activation counts: it lies before the end of the window (or inside it, where asked)."""
        first, last = self._options.window
        here = percentile(activation.last_layer, len(self._plan.layers))
        return here <= last and (here >= first or not self._options.patterns_inside_window)

    def activate(self, activation: Activation, pre: Tensor, kind: str) -> Tensor:
        """Computes an activation of pre [S, ...] and packs the signs of its values in the same pass."""
        post, words = activate_and_pack(pre, kind, samples=self._pattern_samples)
        self._words[activation.call] = words
        return post

    def activated(self, activation: Activation, post: Tensor, first_sample: int) -> None:
        """Packs the signs of post [s, ...], which holds the samples from `first_sample` on."""
        count = min(post.shape[0], self._pattern_samples - first_sample)
        if count > 0:
            words = self._words.get(activation.call)
            self._words[activation.call] = pack_signs(post, words=words, first_sample=first_sample, samples=count)

    def weight(
        self, layer: Layer, inputs: list[Tensor], output_grads: list[Tensor], convolution: Convolution | None
    ) -> None:
        """Reduces the per-group gradients of one weight to their moments, or keeps its operands for `launch`."""
        if inputs[0].device.type == "cpu" or self._at_once:
            self._moments[layer.name] = gradient_moments(inputs, output_grads, self._groups, convolution=convolution)
        else:
            self._problems[layer.name] = MomentProblem(inputs, output_grads, self._groups, convolution)
            self._versions[layer.name] = _versions((*inputs, *output_grads))

    def group_gradient(self, layer: Layer, gradient: Tensor) -> None:
        """Adds the gradient of one more group to the moments of a weight on the slow path."""
        if layer.name not in self._accumulators:
            self._accumulators[layer.name] = MomentsAccumulator(tuple(gradient.shape))
        self._accumulators[layer.name].add(gradient)

    def launch(self) -> None:
        """Starts what takes all layers together, once they are all here, without waiting for a device.

        Raises:
            OperandsChangedError: what a layer was reduced to would not be that of its operands as they were captured.
        """
        for name, problem in self._problems.items():
            if _versions((*problem.inputs, *problem.output_grads)) != self._versions[name]:
                raise OperandsChangedError(f"inputs or output gradients of {name} changed in place after their capture")
        words = [self._words[a.call] for a in self._plan.activations if a.call in self._words]
        if words:
            self._counts = count_patterns_device(words, self._pattern_samples)
        self._pending = launch_gradient_moments(list(self._problems.values()))

    def rows(self) -> tuple[LayerRow, ...]:
        """Returns a row a layer, in order of first use; after `launch`."""
        self._moments.update(zip(self._problems, self._pending.finish(), strict=True))
        self._problems.clear()
        self._moments.update({name: a.finish() for name, a in self._accumulators.items()})
        self._accumulators.clear()
        return tuple(self._row(i + 1, layer) for i, layer in enumerate(self._plan.layers))

    def patterns(self) -> tuple[int, tuple[int, ...] | None]:
        """Returns Psi, and the number of distinct patterns of each activation where they are pooled by sum.

        To be asked after `launch`.
        """
        union, *counts = [0] if self._counts is None else self._counts.tolist()
        return (union, None) if self._options.pooling == "union" else (sum(counts), tuple(counts))

    def positions(self) -> tuple[int, ...]:
        """Returns the positions, for one sample, of each activation that is counted."""
        return tuple(a.positions for a in self._plan.activations if a.call in self._words)

    def saturation(self, psi: int) -> PatternSaturation:
        """Returns how much of its range Psi uses."""
        pools = [sum(self.positions())] if self._options.pooling == "union" else list(self.positions())
        by_samples = sum(2**self._pattern_samples for _ in pools)
        positions = sum(pools)
        ratio = psi / max(sum(min(2**self._pattern_samples, n) for n in pools), 1)
        if psi > SATURATED * by_samples > 0:
            return PatternSaturation(ratio, "samples")
        return PatternSaturation(ratio, "positions" if psi > SATURATED * positions > 0 else None)

    def trainability(self, rows: tuple[LayerRow, ...]) -> float:
        """Returns Lambda: the sum over the layers in the window of the log of their sum over live weights."""
        mean = self._options.numerator == "mean"
        terms = [row.log_sum_mean_over_sigma if mean else row.log_sum_inverse_sigma for row in rows if row.in_window]
        return math.fsum(term for term in terms if term is not None)

    def _row(self, number: int, layer: Layer) -> LayerRow:
        here = percentile(number, len(self._plan.layers))
        inside = self._options.window[0] <= here <= self._options.window[1]
        if not inside:
            return LayerRow(layer.name, number, here, layer.numel, False, None, None, None, None, None, None)
        moments = self._moments.get(layer.name)
        if moments is None:
            return LayerRow(layer.name, number, here, layer.numel, True, layer.numel, None, None, 0.0, 0.0, None)
        share = moments.numel / layer.numel
        return LayerRow(
            layer.name,
            number,
            here,
            layer.numel,
            True,
            moments.dead + layer.numel - moments.numel,
            moments.log_sum_inverse_sigma,
            moments.log_sum_mean_over_sigma,
            moments.mean_sigma * share,
            moments.mean_abs_gradient * share,
            layer.slow_reason,
        )
