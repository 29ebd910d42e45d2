"""AutoFormer candidates scored straight from their supernet: no module is built and nothing is traced a candidate.

A candidate's weights are leading slices of the supernet's, its layers and counts are known in closed form, and its
forward and backward pass is written out. `score(supernet.subnet(arch), ...)` gives the same to rounding.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..capture import Activation, Layer, Plan, SampleAxis, Sandbox, trace
from ..capture.sandbox import random_states, torch_settings
from ..clock import Clock
from ..losses import CrossEntropy, class_labels
from ..memory import Empty
from ..ops.activation_patterns import activate_and_pack
from ..ops.gradient_moments_grouped import PreparedProblem
from ..options import ScoreOptions
from ..proxies.network import Network
from ..proxies.proxy import Need
from ..proxies.result import LswagResult
from ..proxies.shared_work import SharedWork
from ..proxies.statistics import PassStatistics
from ..scoring import Scored, attempted, clock_of, from_pass_alone
from ..spaces.autoformer import AutoFormerSupernet
from ..spaces.autoformer_module import HEAD_DIM, mlp_width
from .autoformer_pass import AutoFormerPass, LayerUse, Weights, nothing
from .cuda_graphs import captures_on
from .static_memory import Capture, Emit, Memory, MemoryPool, NewMemory, StaticMemory

MOST_IN_FLIGHT = 2
"""Candidates that have static memory at a time: one runs while the next is launched."""

Arch = Mapping[str, Any]
Loss = Callable[[Any, Any], Tensor]


class AutoFormerEngine:
    """Scores candidates of one supernet on one batch of images.

    Args:
        supernet: the weights; cast once to the dtype of the options, on their device.
        images: [S, 3, H, W], finite.
        labels: [S] integers, or what `loss` takes; None draws classes from the seed.
        loss: as in :func:`lswag_fast.score`.
        options: resolved, and without extra parameters.
        captures: makes what captures launches, for one candidate at a time; or gives None where none can be. None: CUDA
            graphs on a CUDA device, unless LSWAG_CUDA_GRAPHS says off.
    """

    def __init__(
        self,
        supernet: AutoFormerSupernet,
        images: Tensor,
        labels: Any,
        loss: Loss | None,
        options: ScoreOptions,
        *,
        captures: Callable[[], Capture | None] | None = None,
    ) -> None:
        self._supernet, self._space = supernet, supernet.space
        self._options = options
        self._device = torch.device(options.device)
        dtype: torch.dtype = getattr(torch, options.dtype)
        sizes = supernet.space.options
        side = sizes["image_size"] // sizes["patch_size"]
        self._grid, self._classes = (side, side), sizes["num_classes"]
        self._weights = Weights(supernet.cast(dtype).to(options.device).state_dict())
        self._images = images.to(options.device)
        self._patches = _patches(images.to(options.device), sizes["patch_size"]).to(dtype)
        if loss is None:
            labels = class_labels(labels, len(images), self._classes, options.seed)
        self._labels = labels.to(options.device) if isinstance(labels, Tensor) else labels
        self._default_loss = loss is None
        self._loss: Loss = CrossEntropy() if loss is None else loss
        # Some proxies run passes of their own after this one.
        self.in_flight = MOST_IN_FLIGHT if self._device.type == "cuda" and from_pass_alone(options) else 1
        """How many candidates to launch before the first of them is read."""
        self._captures = captures or captures_on(self._device)
        self.pool = MemoryPool(self._static_memory, MOST_IN_FLIGHT)
        """Where candidates lie on a device."""

    def score(self, arch: Arch) -> LswagResult:
        """Returns the score of a candidate in canonical form.

        Where a device runs out of memory, the candidate is scored once more, one weight at a time.

        Raises:
            ScoreError: a loss is not finite, or memory runs out the second time too.
        """
        return attempted(lambda at_once: self.launch(arch, at_once=at_once).finish())

    def launch(self, arch: Arch, *, at_once: bool = False) -> PendingScore:
        """Starts the score of a candidate; on a device nothing here waits for it, unless weights go one at a time."""
        start = time.perf_counter()
        clock = clock_of(self._options)
        plan = self._plan(arch)
        statistics = PassStatistics(
            plan,
            self._options,
            len(self._patches),
            clock,
            norms=lambda: self._weights.norms(arch),
            at_once=at_once,
        )
        # A loss that somebody gives may draw numbers.
        states = nullcontext() if self._default_loss else random_states()
        with _current(self._device), states, torch_settings(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if at_once:
                self.pool.give_up()
            memory = self.pool.find()
            if memory is not None:
                memory.aside = partial(clock, "capture")
            losses = self._run(arch, plan, statistics, clock, memory or NewMemory())
            statistics.launch(losses)
        scored = Scored(plan, statistics, self._options, clock, partial(self._network, arch))
        pending = PendingScore(scored, caught, start)
        if memory is not None:
            memory.lend(pending)
        return pending

    def _run(self, arch: Arch, plan: Plan, statistics: PassStatistics, clock: Clock, memory: Memory) -> Tensor:
        def packed(block: int, words: Tensor) -> None:
            statistics.packed(plan.activations[block], words)

        def deliver(position: int, use: LayerUse) -> None:
            layer = plan.layers[position]
            if layer.kept and statistics.waits_for_all:
                # The options of an engine are those of all its candidates, and so is the problem of a use.
                use.problem = use.problem or PreparedProblem(
                    statistics.problem([use.inputs], [use.output_grads], use.weight)
                )
                statistics.keep(layer, use.problem)
            elif layer.kept:
                statistics.weight(layer, [use.inputs], [use.output_grads], None, use.weight)

        candidate = self._pass(arch, memory, [statistics.wants(a) for a in plan.activations])
        with clock("forward"):
            logits = candidate.forward(packed)
        losses, grad = self._losses(logits, memory)
        first = next((i for i, layer in enumerate(plan.layers) if layer.kept), None)
        if first is not None:
            with clock("backward"):
                candidate.backward(grad, deliver, first)
        return losses

    def _losses(self, logits: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Returns the losses [S], and the gradient of their sum at the logits, in `memory`."""
        if self._default_loss:
            return self._cross_entropy(logits, memory)
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            losses = self._loss(leaf, self._labels)
            (grad,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), memory.placed("loss", grad)

    def _cross_entropy(self, logits: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        def work(empty: Empty, _: Emit) -> tuple[Tensor, Tensor]:
            return CrossEntropy.with_gradient(logits, self._labels, empty)

        with torch.no_grad():
            return memory.run("loss", None, (logits,), work, nothing)

    def _pass(self, arch: Arch, memory: Memory, packs: Sequence[bool]) -> AutoFormerPass:
        def activate(pre: Tensor, packed: bool, empty: Empty) -> tuple[Tensor, Tensor | None]:
            if not packed:
                return torch.ops.aten.gelu.out(pre, out=empty(pre.shape, dtype=pre.dtype, device=pre.device)), None
            return activate_and_pack(pre, "gelu", samples=self._options.pattern_samples, empty=empty)

        given = (self._weights, arch, self._patches, self._grid)
        return AutoFormerPass(*given, memory=memory, activate=activate, packs=packs)

    def _static_memory(self) -> StaticMemory | None:
        """Returns memory for any candidate of the space; None: launches are not captured.

        Nor can they be where an operation chooses its own memory.
        """
        capture = self._captures()
        if capture is None:
            return None
        choices, memory = self._space.choices, StaticMemory(capture)
        depth = max(choices.depth)
        largest = {
            "embed_dim": max(choices.embed_dim),
            "num_heads": [max(choices.num_heads)] * depth,
            "mlp_ratio": [max(choices.mlp_ratio)] * depth,
        }
        candidate = self._pass(largest, memory, [True] * depth)
        logits = candidate.forward(lambda *_: None)
        left = [*candidate.kept()]
        if self._default_loss:
            _, grad = self._cross_entropy(logits, memory)
        else:
            grad = memory.placed("loss", torch.zeros_like(logits))
        candidate.backward(grad, lambda _, use: left.extend((use.inputs, use.output_grads)), 1)
        return memory if all(map(memory.holds, left)) else None

    def _network(self, arch: Arch, shared: SharedWork) -> Network:
        """Returns the candidate as a module, for proxies that run passes of their own."""
        model = self._supernet.subnet(arch).to(self._options.device).eval()
        sandbox = Sandbox(model, getattr(torch, self._options.dtype))
        plan = trace(sandbox, self._images, self._labels, self._loss)  # the engine's own plan says nothing of calls
        return Network(sandbox, plan, self._images, self._labels, self._loss, self._options.seed, shared)

    def _plan(self, arch: Arch) -> Plan:
        """Returns what a trace of the candidate would find."""
        embed, tokens = arch["embed_dim"], self._patches.shape[1] + 1
        layers = [_layer("patch_embed_super.proj", embed * self._patches.shape[2], 0)]
        activations = []
        for block, (heads, ratio) in enumerate(zip(arch["num_heads"], arch["mlp_ratio"], strict=True)):
            inner, hidden = HEAD_DIM * heads, mlp_width(embed, ratio)
            numels = {"attn.qkv": 3 * inner * embed, "attn.proj": inner * embed}
            numels |= {"fc1": hidden * embed, "fc2": embed * hidden}
            activations.append(Activation(block, "gelu", len(layers) + 3, tokens * hidden, SampleAxis(0, 1)))
            layers += [
                _layer(f"blocks.{block}.{name}", n, len(layers) + i) for i, (name, n) in enumerate(numels.items())
            ]
        layers.append(_layer("head", self._classes * embed, len(layers)))
        return Plan(layers, activations, [], [], None, (), self._space.macs(arch), self._space.params(arch))


@dataclass
class PendingScore:
    """A score that a device may still be computing."""

    scored: Scored
    caught: list[warnings.WarningMessage]
    start: float
    finished: bool = False

    def finish(self) -> LswagResult:
        """Waits for it and returns it, once; raises ScoreError where a loss is not finite."""
        try:
            # Passes of a proxy's own may draw numbers.
            settings = nullcontext() if from_pass_alone(self.scored.options) else _pass_settings()
            with settings, warnings.catch_warnings(record=True) as later:
                warnings.simplefilter("always")
                result = self.scored.result(self.scored.options, self.caught, self.start)
        finally:
            self.finished = True
        return replace(result, warnings=(*result.warnings, *dict.fromkeys(str(w.message) for w in later)))


def engine_for(
    supernet: Any, images: Tensor, labels: Any, loss: Loss | None, options: ScoreOptions
) -> AutoFormerEngine | None:
    """Returns the engine of a supernet and resolved options; None: its candidates are scored as any other module."""
    if not isinstance(supernet, AutoFormerSupernet) or options.extra_parameters or Need.OUTPUTS in options.needs():
        return None
    return AutoFormerEngine(supernet, images, labels, loss, options)


@contextmanager
def _pass_settings() -> Iterator[None]:
    with random_states(), torch_settings():
        yield


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one, so that no launch has to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _layer(name: str, numel: int, position: int) -> Layer:
    return Layer(f"{name}.weight", numel, position, [position])


def _patches(images: Tensor, size: int) -> Tensor:
    """Returns [S, patches, 3 * size * size]: the patch convolution is a linear map of these."""
    samples, channels, height, width = images.shape
    cut = images.reshape(samples, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(samples, -1, channels * size * size)
