"""Reduces one shared forward and backward pass, as it goes, to what the proxies are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache

import torch
from torch import Tensor

from .. import backends
from ..capture import Activation, Layer, Plan
from ..clock import Clock
from ..errors import ScoreError
from ..host_copies import HostCopies
from ..ops.activation_patterns import activate_and_pack, count_patterns_device, hamming_kernel, pack_signs
from ..ops.channel_saliency import channel_saliency
from ..ops.gradient_moments import Convolution, GradientMoments, MomentsAccumulator
from ..ops.gradient_moments_grouped import (
    MomentProblem,
    PendingMoments,
    PreparedProblem,
    gradient_moments_grouped,
    launch_gradient_moments,
)
from ..options import ScoreOptions
from .evidence import AGREEMENTS, DISTINCT, GradientSums, LayerEvidence
from .proxy import OF_GRADIENTS, OF_PATTERNS, Need
from .result import LayerRow, PatternSaturation
from .shared_work import label

SATURATED = 0.95
"""The share of a bound of Psi above which a result says that Psi ranks little but that bound."""


@cache
def percentile(number: int, count: int) -> int:
    """Returns the percentile of depth of layer `number` (from 1) of `count` (equation 6 of L-SWAG)."""
    return 10 * int((number / count * 100) // 10)


class OperandsChangedError(ScoreError):
    """The model worked in place on a tensor that was kept for the grouped launch; `at_once` keeps none."""


class PassStatistics:
    """Collects what L-SWAG and the other proxies of a score need from the pass that they share.

    L-SWAG itself needs the inputs and output gradients of the weights in the window, and the activations up to its
    end; proxies that look at the whole network widen that, and `needs` of theirs says what else is reduced.

    On the CPU the moments of a weight are reduced when it comes, its operands still in the cache. On a device all of
    them wait for one grouped launch, unless `at_once`, which needs less memory. There the host waits once, for the
    numbers of all reductions together, when the first of them is asked for after `launch`.

    Args:
        plan: of the network; here its layers are restricted to those that are looked at.
        options: resolved.
        samples: S.
        parameters: the network's, by name, against which gradients are reduced; needed for Need.GRADIENT alone.
        norms: returns `norm_of` the weight of each layer of the plan [layers]; needed for Need.NORMS alone.
        clock: gets a label a kind of reduction.
    """

    def __init__(
        self,
        plan: Plan,
        options: ScoreOptions,
        samples: int,
        clock: Clock,
        *,
        parameters: Mapping[str, Tensor] | None = None,
        norms: Callable[[], Tensor] | None = None,
        at_once: bool = False,
    ) -> None:
        assert options.groups is not None
        assert options.pattern_samples is not None
        self._plan = plan
        self._options = options
        self._samples = samples
        self._clock = clock
        self._parameters = parameters or {}
        self._norms = norms if Need.NORMS in options.needs() else None
        self._groups: int = options.groups
        self._pattern_samples: int = options.pattern_samples
        needs = options.needs()
        self._signed, self._wants_gradient = Need.SIGNED in needs, Need.GRADIENT in needs
        self._wants_outputs = Need.OUTPUTS in needs
        self._wants_distinct, self._wants_agreements = Need.DISTINCT in needs, Need.AGREEMENTS in needs
        whole = options.needs(whole=True)
        self._all_patterns = bool(whole & OF_PATTERNS)
        every_layer = bool(whole & OF_GRADIENTS)
        plan.restrict(lambda i: every_layer or self._in_window(i + 1))
        self._moments: dict[str, GradientMoments] = {}
        self._accumulators: dict[str, MomentsAccumulator] = {}
        self._gradients: dict[str, Tensor] = {}
        self._gradient_sums: dict[str, Tensor] = {}
        self._channels: dict[str, Tensor] = {}
        self._words: dict[int, Tensor] = {}
        self._at_once = at_once
        self._grouped = backends.implementation("gradient_moments", torch.device(options.device).type) != "cpp"
        self._problems: dict[str, MomentProblem | PreparedProblem] = {}
        self._versions: dict[str, tuple[list[Tensor], list[int]]] = {}
        self._pending = PendingMoments([], [])
        self._copies = HostCopies({})

    def wants(self, activation: Activation) -> bool:
        """Whether the patterns of this activation are looked at."""
        return self._all_patterns or self._counted(activation)

    def activate(self, activation: Activation, pre: Tensor, kind: str) -> Tensor:
        """Computes an activation of pre [S, ...] and packs the signs of its values in the same pass."""
        with self._clock(Need.PATTERNS.name):
            post, words = activate_and_pack(pre, kind, samples=self._pattern_samples)
        self.packed(activation, words)
        return post

    def packed(self, activation: Activation, words: Tensor) -> None:
        """Takes the words of an activation, which `activate_and_pack` packed of the first `pattern_samples` samples."""
        self._words[activation.call] = words

    def activated(self, activation: Activation, post: Tensor, first_sample: int) -> None:
        """Packs the signs of post [s, ...], which holds the samples from `first_sample` on."""
        count = min(post.shape[0], self._pattern_samples - first_sample)
        if count > 0:
            words = self._words.get(activation.call)
            with self._clock(Need.PATTERNS.name):
                packed = pack_signs(post, words=words, first_sample=first_sample, samples=count)
            self._words[activation.call] = packed

    def weight(
        self,
        layer: Layer,
        inputs: list[Tensor],
        output_grads: list[Tensor],
        convolution: Convolution | None,
        operand: Tensor,
    ) -> None:
        """Reduces the per-group gradients of one weight to their moments, or keeps its operands for `launch`."""
        if convolution is not None:
            operand = operand.reshape(*operand.shape[:2], *convolution.kernel_size)
        with self._clock(Need.MOMENTS.name):
            problem = self.problem(inputs, output_grads, operand, convolution)
            if self.waits_for_all:
                self._problems[layer.name] = problem
                operands = [*inputs, *output_grads]
                self._versions[layer.name] = operands, _versions(operands)
            else:
                (self._moments[layer.name],) = gradient_moments_grouped([problem])

    @property
    def waits_for_all(self) -> bool:
        """Whether moments are launched at the end, those of all weights together."""
        return self._grouped and not self._at_once

    def problem(
        self, inputs: list[Tensor], output_grads: list[Tensor], weight: Tensor, convolution: Convolution | None = None
    ) -> MomentProblem:
        """Returns what the moments of a weight are launched by."""
        return MomentProblem(
            inputs,
            output_grads,
            self._groups,
            convolution,
            signed=self._signed or self._wants_gradient,
            weight=weight if self._wants_gradient else None,
        )

    def keep(self, layer: Layer, problem: PreparedProblem) -> None:
        """Takes a `problem` whose operands keep their values until `launch`, where `waits_for_all`."""
        self._problems[layer.name] = problem

    def group_gradient(self, layer: Layer, gradient: Tensor) -> None:
        """Adds the gradient of one more group to the statistics of a weight on the slow path."""
        with self._clock(Need.MOMENTS.name):
            if layer.name not in self._accumulators:
                self._accumulators[layer.name] = MomentsAccumulator(tuple(gradient.shape), signed=self._signed)
            self._accumulators[layer.name].add(gradient)
        if self._wants_gradient:
            with self._clock(Need.GRADIENT.name):
                so_far = self._gradients.get(layer.name)
                self._gradients[layer.name] = gradient.float() if so_far is None else so_far + gradient

    def wants_outputs(self) -> bool:
        """Whether the outputs of layers are to be handed over."""
        return self._wants_outputs

    def output(self, layer: Layer, output: Tensor, output_grad: Tensor, channel_axis: int) -> None:
        """Adds sum over n, c of (sum over positions of y * d)^2 of an output [s, ...] to the sum of its layer."""
        with self._clock(Need.OUTPUTS.name):
            found = channel_saliency(output, output_grad, channel_axis)
            self._channels[layer.name] = found + self._channels.get(layer.name, 0)

    def launch(self, losses: Tensor, others: Mapping[str, Tensor] | None = None) -> None:
        """Starts what takes all layers together, once they are all here, and the copy to the host; waits for nothing.

        Args:
            losses: [S], of the pass; they come to the host with the rest.
            others: tensors to be brought along, by names of their own.

        Raises:
            OperandsChangedError: what a layer was reduced to would not be that of its operands as they were captured.
        """
        for name, (operands, versions) in self._versions.items():
            if _versions(operands) != versions:
                raise OperandsChangedError(f"inputs or output gradients of {name} changed in place after their capture")
        self._versions.clear()
        found = {"losses": losses, **(others or {})}
        with self._clock(Need.PATTERNS.name):
            words = [self._words[a.call] for a in self._counted_activations()]
            if words:
                found["counts"] = count_patterns_device(words, self._pattern_samples)
        every = list(self.words())
        if self._wants_distinct and len(every) > len(words):
            with self._optional(label(DISTINCT)):
                found["distinct"] = count_patterns_device(every, self._pattern_samples)[:1]
        if self._wants_agreements and every:
            with self._optional(label(AGREEMENTS)):
                found["agreements"] = hamming_kernel(every, self._pattern_samples)
        with self._clock(Need.MOMENTS.name):
            self._pending = launch_gradient_moments(list(self._problems.values()))
            if self._pending.sums is not None:
                found["moments"] = self._pending.sums
            accumulated = [s for a in self._accumulators.values() if (s := a.sums()) is not None]
            if accumulated:
                found["accumulated"] = torch.stack(accumulated)
        if self._norms is not None:
            with self._optional(Need.NORMS.name):
                found["norms"] = self._norms()
        for name, gradient in self._gradients.items():
            with self._clock(Need.GRADIENT.name):
                self._gradient_sums[name] = _sums(gradient, self._parameters[name], 1 / self._groups)
        self._gradients.clear()
        for what, sums in (("gradients", self._gradient_sums), ("channels", self._channels)):
            if sums:
                found[what] = torch.stack(list(sums.values()))
        self._copies = HostCopies(found)

    @contextmanager
    def _optional(self, label: str) -> Iterator[None]:
        """Work that L-SWAG does without: where it fails, the proxy that wants it fails alone, in time."""
        with suppress(Exception), self._clock(label):
            yield

    def brought(self) -> Mapping[str, Tensor]:
        """Returns what came to the host, by name; after `launch`, which started the copy."""
        return self._copies.wait()

    def losses(self) -> Tensor:
        """Returns the losses of the pass [S], on the host; after `launch`."""
        return self._copies.wait()["losses"]

    def rows(self) -> tuple[LayerRow, ...]:
        """Returns a row a layer, in order of first use; after `launch`."""
        found = self._copies.wait()
        self._moments.update(zip(self._problems, self._pending.finish(found.get("moments")), strict=True))
        self._problems.clear()
        accumulated = found["accumulated"].tolist() if "accumulated" in found else [None] * len(self._accumulators)
        finished = zip(self._accumulators.items(), accumulated, strict=True)
        self._moments.update({name: a.finish(sums=sums) for (name, a), sums in finished})
        self._accumulators.clear()
        return tuple(self._row(i + 1, layer) for i, layer in enumerate(self._plan.layers))

    def layers(self) -> tuple[LayerEvidence, ...]:
        """Returns what was collected of every layer, in order of first use; after `rows`."""
        found = self._copies.wait()
        gradients, channels = (
            dict(zip(sums, found[what].tolist(), strict=True)) if sums else {}
            for what, sums in (("gradients", self._gradient_sums), ("channels", self._channels))
        )
        # The gradient at an output is that of the sum of losses where all samples run together.
        scale = 1.0 if self._plan.coupled else 1 / self._samples**2
        norms = found["norms"].tolist() if "norms" in found else [math.nan] * len(self._plan.layers)
        return tuple(
            LayerEvidence(
                layer.name,
                layer.numel,
                self._moments.get(layer.name),
                self._sums_of(layer.name, gradients),
                0.5 * channels[layer.name] * scale / self._samples if layer.name in channels else None,
                norm,
            )
            for layer, norm in zip(self._plan.layers, norms, strict=True)
        )

    def words(self) -> tuple[Tensor, ...]:
        """Returns the packed patterns of every activation that was looked at."""
        return tuple(self._words[a.call] for a in self._plan.activations if a.call in self._words)

    def patterns(self) -> tuple[int, tuple[int, ...] | None]:
        """Returns Psi, and the number of distinct patterns of each activation where they are pooled by sum.

        To be asked after `launch`.
        """
        found = self._copies.wait()
        union, *counts = found["counts"].tolist() if "counts" in found else [0]
        return (union, None) if self._options.pooling == "union" else (sum(counts), tuple(counts))

    def distinct_patterns(self) -> int | None:
        """Returns the distinct patterns of `words`, after `launch`; None where Psi counts some and nobody needs all."""
        found = self._copies.wait()
        counted = len(self.words()) == len(self._counted_activations())
        of_all = found.get("counts") if counted else found.get("distinct")
        return None if of_all is None else int(of_all[0])

    def agreements(self) -> Tensor | None:
        """Returns at how many positions each two samples agree, int64 on the host, after `launch`; None: not needed."""
        return self._copies.wait().get("agreements")

    def positions(self) -> tuple[int, ...]:
        """Returns the positions, for one sample, of each activation that Psi counts."""
        return tuple(a.positions for a in self._counted_activations())

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

    def _in_window(self, number: int) -> bool:
        first, last = self._options.window
        return first <= percentile(number, len(self._plan.layers)) <= last

    def _counted(self, activation: Activation) -> bool:
        """Whether Psi counts it: it lies before the end of the window (or inside it, where asked)."""
        first, last = self._options.window
        here = percentile(activation.last_layer, len(self._plan.layers))
        return here <= last and (here >= first or not self._options.patterns_inside_window)

    def _counted_activations(self) -> list[Activation]:
        return [a for a in self._plan.activations if a.call in self._words and self._counted(a)]

    def _sums_of(self, name: str, gradients: Mapping[str, Sequence[float]]) -> GradientSums | None:
        """Returns what the gradient of the batch's mean loss, which is the mean of the groups', was reduced to."""
        if name in gradients:
            return GradientSums(*gradients[name])
        moments = self._moments.get(name)
        signed = None if moments is None else moments.signed
        if moments is None or signed is None or signed.saliency is None or signed.absolute_saliency is None:
            return None
        norm = math.sqrt(moments.numel * signed.mean_squared_mean)
        return GradientSums(norm, signed.saliency, signed.absolute_saliency)

    def _row(self, number: int, layer: Layer) -> LayerRow:
        here = percentile(number, len(self._plan.layers))
        if not self._in_window(number):
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


def norm_of(weight: Tensor) -> Tensor:
    """Returns the Euclidean norm of a weight, float64 on its device."""
    norm: Tensor = torch.linalg.vector_norm(weight, dtype=torch.float64)
    return norm


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Returns how often each tensor was written to in place; inference tensors do not say."""
    return [0 if t.is_inference() else t._version for t in tensors]


def _sums(gradient: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Returns float64 [3]: the norm of scale * g, and the sums of scale * g * w and of its magnitudes."""
    products = gradient.float() * weight.float()
    norm = torch.linalg.vector_norm(gradient.float(), dtype=torch.float64)
    sums = (norm, products.sum(dtype=torch.float64), products.abs().sum(dtype=torch.float64))
    return torch.stack(sums) * scale
