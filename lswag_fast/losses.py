"""The default loss, and the logits and labels it takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .capture.trace import describe
from .errors import InputError
from .memory import Empty
from .value_checks import LateChecks, ValueCheck


class CrossEntropy:
    """The default loss: cross-entropy of logits [S, classes], one value a sample, in float32."""

    classes = 0

    def __call__(self, output: Any, labels: Tensor) -> Tensor:
        """Returns [S] losses; raises InputError where the output holds no logits [S, classes]."""
        logits = logits_of(output)
        self.classes = logits.shape[1]
        return F.cross_entropy(logits.float(), labels, reduction="none")

    @staticmethod
    def with_gradient(logits: Tensor, labels: Tensor, empty: Empty) -> tuple[Tensor, Tensor]:
        """Returns the losses [S] of logits [S, classes], and the gradient of their sum there, without autograd.

        Labels are taken to be classes (`class_labels` checks them). Raises InputError as a call of it does.
        """
        log_softmax = F.log_softmax(logits_of(logits).float(), dim=1)
        losses = empty(labels.shape, dtype=log_softmax.dtype, device=logits.device)
        torch.neg(log_softmax.gather(1, labels.unsqueeze(1)).squeeze(1), out=losses)
        classes = torch.arange(logits.shape[1], device=logits.device)
        gradient = empty(logits.shape, dtype=logits.dtype, device=logits.device)
        of_log_softmax = -(labels.unsqueeze(1) == classes).float()
        gradient.copy_(torch.ops.aten._log_softmax_backward_data(of_log_softmax, log_softmax, 1, log_softmax.dtype))
        return losses, gradient


def logits_of(output: Any) -> Tensor:
    """Returns the logits [S, classes] of a model's output: itself, its `.logits`, or the first of a tuple."""
    logits = getattr(output, "logits", output)
    if isinstance(logits, dict) and "logits" in logits:
        logits = logits["logits"]
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise InputError(
            f"the default loss, cross-entropy, takes logits [S, classes] of two or more classes, but the model "
            f"returns {describe(logits)}; pass loss=callable(output, labels) that returns one loss a sample, [S]"
        )
    return logits


def class_labels(
    labels: Tensor | None, samples: int, classes: int, seed: int, late: LateChecks | None = None
) -> Tensor:
    """Returns labels [S] int64: those given, checked, or uniform ones drawn from `seed` on the CPU.

    With `late`, the range of labels on a CUDA device is left for it to judge, and those returned are clamped to it: a
    class out of range would end the use of that device in this process. Raises InputError for labels that do not fit.
    """
    if labels is None:
        return torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or tuple(labels.shape) != (samples,):
        raise InputError(
            f"expected integer labels [S] with the S of images ({samples}), got {list(labels.shape)} of {labels.dtype}"
        )

    def refuse(limits: Tensor) -> None:
        low, high = map(int, limits.tolist())
        if low < 0 or high >= classes:
            raise InputError(f"labels must be from 0 to {classes - 1}, the model's classes, got {low} to {high}")

    given, limits = labels.long(), torch.stack((labels.min(), labels.max()))
    return ValueCheck("labels", given, limits, refuse, lambda: given.clamp(0, classes - 1)).passed(late)
