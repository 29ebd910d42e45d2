"""`score`: the L-SWAG score of one network on one batch of images."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .backends import resolve_device
from .capture import Plan, Sandbox, trace
from .capture import run as run_capture
from .capture.probe import UnknownOrderError, probe
from .capture.run import check_losses
from .capture.sandbox import check_device, preserved, random_states
from .capture.trace import describe, take
from .clock import Clock
from .errors import InputError, ScoreError, is_out_of_memory
from .losses import CrossEntropy, class_labels
from .options import Numerator, Pooling, ScoreOptions
from .proxies.evaluation import evaluate
from .proxies.evaluation import seconds as proxy_seconds
from .proxies.evidence import Evidence
from .proxies.network import Network
from .proxies.proxy import Proxy
from .proxies.result import Counts, LayerRow, LswagResult, PatternSaturation
from .proxies.shared_work import SharedWork
from .proxies.statistics import OperandsChangedError, PassStatistics, norm_of
from .value_checks import LateChecks, ValueCheck

Loss = Callable[[Any, Any], Tensor]


def score(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    groups: int | None = None,
    loss: Loss | None = None,
    window: tuple[int, int] = (0, 100),
    pooling: Pooling = "union",
    pattern_samples: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    numerator: Numerator = "one",
    patterns_inside_window: bool = False,
    extra_parameters: Sequence[str] = (),
    proxies: Sequence[str | Proxy] = ("lswag",),
) -> LswagResult:
    """Returns the L-SWAG score of `model` (Casarin et al., CVPR 2025, equations 1, 6, 7, 8), and other proxies.

    The model is left as it was: parameters, gradients, buffers, modes, random states and torch's settings.

    On a CUDA device the host waits once, for the results. It waits more often for weights that go one at a time and for
    proxies that run passes of their own. Where the results say that a model folds its samples into another axis in an
    order that cannot be told, the pass is run again, and the seconds hold both.

    Args:
        model: any module whose forward pass takes one batch of images. Dropout is off while scoring; batch
            normalisation keeps its mode, and couples the samples where it normalises by the batch. No other coupling is
            recognised: a model that mixes its samples otherwise (z - z.mean(0)) is scored as if it did not.
        images: [S, ...] floating-point, S from 2 to 1024, on the device of the model.
        labels: [S] integer classes for the default loss (None: drawn from `seed`). With `loss`, an array [S, ...],
            which is cut to the samples of each pass, or anything else, which is handed to the loss as it is.
        groups: G, the number of gradient groups that sigma is taken over; must divide S. None: one a sample (2
            where samples are coupled).
        loss: a callable (output, labels) -> [S], one loss a sample. None: cross-entropy of logits [S, classes].
        window: the first and last percentile of depth that Lambda sums over; Psi counts up to its end.
        pooling: "union" counts distinct patterns over all activations, "sum" adds their counts.
        pattern_samples: count patterns over the first k samples only. None: all.
        dtype: "float32" (IEEE), "bfloat16", or "auto": bfloat16 where the device multiplies it natively.
        device: "cpu", "cuda", "cuda:N", or "auto": where the images are. The model must be there.
        seed: of the labels, where none are given.
        numerator: "one" (L-SWAG) or "mean" (ZiCo's mean of |g| over sigma).
        patterns_inside_window: count Psi inside the window only.
        extra_parameters: names of parameters to score as layers too (biases, norms, embeddings), by the slow path and
            numbered after all others.
        proxies: names (`lswag_fast.proxies.names()`), or proxies with options of their own, whose values and seconds
            the result then has too. L-SWAG is always computed; those that need the same pass share it.

    Raises:
        InputError: the arguments do not fit the model or each other; nothing has been computed then. Only the values of
            images and labels on a CUDA device are judged with the results, ahead of any other error.
        ScoreError: a loss is not finite, the model cannot be captured, or memory runs out, also with one weight at a
            time.
    """
    options = ScoreOptions(
        groups=groups,
        window=window,
        pooling=pooling,
        pattern_samples=pattern_samples,
        dtype=dtype,
        device=device,
        seed=seed,
        numerator=numerator,
        patterns_inside_window=patterns_inside_window,
        extra_parameters=extra_parameters,
        proxies=proxies,
    )
    start = time.perf_counter()
    if options.device == "auto" and isinstance(images, Tensor) and images.device.type in ("cpu", "cuda"):
        options = replace(options, device=str(images.device))
    with LateChecks() as late:
        images = check_images(images, resolve_device(options.device), late)
        resolved = options.resolved(images.shape[0])
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {describe(model)}")
        check_device(model, resolved.device)
        labels = _checked_labels(labels, images.shape[0], loss, resolved.device)
        with preserved(model), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subject = _prepared(model, images, labels, loss, options, resolved, late)
            result = subject.result(options, caught, start)
    if result.uncovered:
        warnings.warn(f"{result.warnings[0]}", stacklevel=2)
    return result


@dataclass(frozen=True)
class _Subject:
    """A network and a batch, checked and traced, ready for the pass that is scored."""

    sandbox: Sandbox
    plan: Plan
    images: Tensor
    labels: Any
    loss: Loss
    options: ScoreOptions  # resolved
    clock: Clock
    late: LateChecks  # of images and labels, and of the orders of samples that the plan goes by

    def result(self, asked: ScoreOptions, caught: list[warnings.WarningMessage], start: float) -> LswagResult:
        """Returns the result of the pass, run once more where its plan took for granted what `late` then refutes."""
        before = len(caught)

        def attempt(at_once: bool) -> LswagResult:
            del caught[before:]
            with random_states():  # each attempt draws what the first one drew
                return self.scored(at_once).result(asked, caught, start)

        try:
            with self.late:
                return attempted(attempt)
        except UnknownOrderError:
            pass
        # What the first pass held is free now that its error is.
        return attempted(attempt)

    def scored(self, at_once: bool) -> Scored:
        """Runs the pass; `at_once` keeps no operand of one weight until those of the others are there."""
        plan, options, clock = self.plan.copy(), self.options, self.clock  # a pass leaves out what nobody looks at
        statistics = PassStatistics(
            plan,
            options,
            len(self.images),
            clock,
            parameters=self.sandbox.parameters,
            norms=lambda: torch.stack([norm_of(self.sandbox.parameters[layer.name]) for layer in plan.layers]),
            at_once=at_once,
        )
        assert options.groups is not None
        losses = run_capture(plan, self.sandbox, self.images, self.labels, self.loss, options.groups, statistics, clock)
        statistics.launch(losses, self.late.numbers())
        return Scored(plan, statistics, options, clock, self.network, self.late)

    def network(self, shared: SharedWork) -> Network:
        """Returns the network for proxies that run passes of their own."""
        return Network(self.sandbox, self.plan, self.images, self.labels, self.loss, self.options.seed, shared)


def _checked_labels(labels: Any, samples: int, loss: Loss | None, device: str) -> Any:
    if isinstance(labels, list) or hasattr(labels, "__array__"):
        labels = torch.as_tensor(labels)
    if isinstance(labels, Tensor) and labels.device.type != "cpu":
        labels = labels.to(device)
    if loss is not None and isinstance(labels, Tensor) and (labels.dim() == 0 or labels.shape[0] != samples):
        raise InputError(f"expected labels [S, ...] with the S of images ({samples}), got {list(labels.shape)}")
    return labels


def _prepared(
    model: nn.Module,
    images: Tensor,
    labels: Any,
    loss: Loss | None,
    asked: ScoreOptions,
    options: ScoreOptions,
    late: LateChecks,
) -> _Subject:
    """Traces the model, settles the options by what is found, and draws or checks the labels."""
    samples = len(images)
    if isinstance(labels, Tensor) and labels.is_inference():
        labels = labels.clone()  # inference tensors cannot be saved for a backward pass
    clock = clock_of(options)
    with clock("trace"):
        sandbox = Sandbox(model, getattr(torch, options.dtype))
        function: Loss = CrossEntropy() if loss is None else loss
        default = isinstance(function, CrossEntropy)
        placeholder = torch.zeros(samples, dtype=torch.long, device=images.device) if default else labels
        plan = trace(sandbox, images, placeholder, function, options.extra_parameters)
    if plan.coupled is not None:
        options = asked.resolved(samples, coupled=True)
    if isinstance(function, CrossEntropy):
        labels = class_labels(labels, samples, function.classes, options.seed, late)
    if isinstance(labels, Tensor):
        labels = labels.to(options.device, non_blocking=True)  # they are there, or come from the CPU
    with clock("trace"):
        probe(plan, sandbox, take(images, 2), late)
    return _Subject(sandbox, plan, images, labels, function, options, clock, late)


def attempted(attempt: Callable[[bool], LswagResult]) -> LswagResult:
    """Returns attempt(False); where it fails for what it keeps until the end, attempt(True), with a weight at a time.

    Raises ScoreError where memory runs out again.
    """
    try:
        return attempt(False)
    except OperandsChangedError:
        pass
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # What the first attempt held is free now that its error is.
    torch.cuda.empty_cache()
    try:
        return attempt(True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    raise ScoreError(
        f"out of memory, also with one weight at a time: {reason}; score fewer images, or in dtype='bfloat16'"
    )


def check_images(images: Tensor, device: str, late: LateChecks | None = None) -> Tensor:
    """Returns `images` if they are a finite floating-point tensor [S, ...] on `device`, S at least 1.

    With `late`, the values of images on a CUDA device are left for it to judge, and in those returned zeros stand for
    values that are not finite: a loss may have the device stop at such a one for good. Raises InputError for others.
    """
    if not isinstance(images, Tensor) or images.dim() < 2 or not images.is_floating_point():
        what = describe(images) + (f" of {images.dtype}" if isinstance(images, Tensor) else "")
        raise InputError(f"images must be a floating-point tensor [S, channels, height, width], got {what}")
    if images.shape[0] == 0:
        raise InputError("images holds no image; a score needs at least 2")
    if images.device.type != torch.device(device).type:
        raise InputError(f"images are on {images.device}, but the score runs on {device}; move them there")
    finite = torch.isfinite(images).flatten(1).all(1)
    return ValueCheck("images", images, finite, _refuse_images, lambda: _finite_images(images)).passed(late)


def _refuse_images(finite: Tensor) -> None:
    """Raises InputError unless all of [S] are true, and names the first images that are not."""
    bad = [i for i, good in enumerate(finite.tolist()) if not good]
    if bad:
        shown = ", ".join(str(i) for i in bad[:5]) + (" ..." if len(bad) > 5 else "")
        raise InputError(f"images must be finite, but NaN or Inf is in image {shown}; leave it out or mend it")


def _finite_images(images: Tensor) -> Tensor:
    return torch.nan_to_num(images.detach(), nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class Scored:
    """A pass over one network that is through, or that a device is still computing."""

    plan: Plan
    statistics: PassStatistics
    options: ScoreOptions  # resolved
    clock: Clock
    make_network: Callable[[SharedWork], Network]
    late: LateChecks = field(default_factory=LateChecks)  # of what the pass was given

    def result(self, asked: ScoreOptions, caught: Sequence[warnings.WarningMessage], start: float) -> LswagResult:
        """Waits for the pass and returns its result; `start` is when the score began.

        Raises the error of a late check that fails (InputError where values are bad) before anything else is judged,
        and ScoreError where a loss is not finite. Warnings that are caught until then are in the result.
        """
        statistics = self.statistics
        self.late.judge(statistics.brought())
        rows = statistics.rows()
        psi, by_activation = statistics.patterns()
        check_losses(statistics.losses())
        saturation = statistics.saturation(psi)
        trainability = statistics.trainability(rows)
        proxies = self.options.chosen
        found = evaluate(proxies, self._evidence(trainability, psi), self.clock)
        messages = _messages(self.plan, self.options, asked, rows, saturation)
        seconds = time.perf_counter() - start
        return LswagResult(
            lswag=trainability * psi,
            trainability=trainability,
            expressivity=psi,
            pattern_saturation=saturation,
            counts=Counts(
                parameters=self.plan.parameters,
                multiply_adds=self.plan.multiply_adds,
                sum_log_numel=math.fsum(math.log(row.numel) for row in rows if row.in_window),
                positions=sum(statistics.positions()),
            ),
            layers=rows,
            patterns_by_activation=by_activation,
            uncovered=self.plan.uncovered,
            warnings=(*messages, *found.messages, *dict.fromkeys(str(w.message) for w in caught)),
            proxies=found.values,
            proxy_details=found.details,
            proxy_seconds=proxy_seconds(proxies, found, self.clock)
            if has_other_proxies(self.options)
            else {"lswag": seconds},
            seconds=seconds,
            options=self.options.to_dict(),
        )

    def _evidence(self, trainability: float, psi: int) -> Evidence:
        assert self.options.pattern_samples is not None
        assert self.options.groups is not None
        return Evidence(
            layers=self.statistics.layers() if has_other_proxies(self.options) else (),  # L-SWAG reads none
            trainability=trainability,
            expressivity=psi,
            parameters=self.plan.parameters,
            multiply_adds=self.plan.multiply_adds,
            groups=self.options.groups,
            words=self.statistics.words(),
            pattern_samples=self.options.pattern_samples,
            make_network=self.make_network,
            counted=self.statistics.distinct_patterns(),
            agreed=self.statistics.agreements(),
            shared=SharedWork(self.clock),
        )


def clock_of(options: ScoreOptions) -> Clock:
    """Returns the clock of a score: one that stands still where L-SWAG alone is asked for."""
    return Clock(options.device, running=has_other_proxies(options))


def has_other_proxies(options: ScoreOptions) -> bool:
    """Tells whether others than L-SWAG are asked for."""
    return [p.name for p in options.chosen] != ["lswag"]


def from_pass_alone(options: ScoreOptions) -> bool:
    """Tells whether all proxies asked for are made of numbers of the shared pass."""
    return all(proxy.from_pass for proxy in options.chosen)


def _finite(row: LayerRow) -> bool:
    terms = (row.log_sum_inverse_sigma, row.log_sum_mean_over_sigma)
    return all(term is None or math.isfinite(term) for term in terms)


def _messages(
    plan: Plan, resolved: ScoreOptions, asked: ScoreOptions, rows: Sequence[LayerRow], saturation: PatternSaturation
) -> list[str]:
    messages = []
    if plan.uncovered:
        messages.append(f"weights that are not covered and not in the score: {', '.join(plan.uncovered)}")
    if plan.coupled is not None:
        notice = f"samples are coupled by {plan.coupled}: each of the {resolved.groups} groups took its own pass"
        messages.append(notice + ("" if asked.groups is not None else "; groups=2 was chosen"))
    slow = [row for row in rows if row.slow is not None]
    if slow and plan.coupled is None:
        reasons = "; ".join(f"{row.name}: {row.slow}" for row in slow)
        messages.append(f"{len(slow)} weights took one forward and backward pass a group ({reasons})")
    endless = [row.name for row in rows if row.log_sum_inverse_sigma is not None and not _finite(row)]
    if endless:
        messages.append(f"gradients that are not finite make the score NaN or infinite: {', '.join(endless)}")
    dead = [row.name for row in rows if row.dead == row.numel]
    if dead:
        messages.append(f"layers of dead weights alone, which add nothing: {', '.join(dead)}")
    if saturation.bound is not None:
        other = "samples in the batch" if saturation.bound == "samples" else "positions in the network"
        messages.append(
            f"Psi is at {saturation.ratio:.3f} of its bound by the number of {other} and tells networks apart by "
            f"little else; pattern_samples of 18 to 24 often lies between both bounds"
        )
    lost = sum(a.axis is None for a in plan.activations)
    if lost:
        messages.append(f"{lost} activations are not counted in Psi: their sample axis cannot be told")
    if not plan.activations:
        messages.append("no ReLU, GELU, SiLU or Hardswish activation was found, so Psi and the score are 0")
    return messages
