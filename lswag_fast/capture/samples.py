"""Where the samples are in a tensor: established from its shapes at two batch sizes, never assumed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TRACE_BATCHES = (2, 3)


@dataclass(frozen=True)
class SampleAxis:
    """The axis that grows with the batch, and how many entries each sample has on it."""

    axis: int
    factor: int  # entries a sample; above 1 where another axis is folded into this one, 0 where all samples share them
    sample_major: bool | Tensor = True
    """Where factor > 1, once it is probed: the entries of one sample lie together. A bool tensor []: it says so on its
    device, which the host has not asked."""

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """Returns a view of `tensor` as [S, ...]; the folded axis, if any, comes second.

        It is a copy where a device alone knows the order, which the host then need not wait for.
        """
        if self.factor == 0:
            return tensor.expand(samples, *tensor.shape)
        if self.factor == 1:
            return tensor.movedim(self.axis, 0)
        if isinstance(self.sample_major, Tensor):
            together = replace(self, sample_major=True).split(tensor, samples)
            alternating = replace(self, sample_major=False).split(tensor, samples)
            return torch.where(self.sample_major, together, alternating)
        shape, axis = tensor.shape, self.axis
        if self.sample_major:
            unfolded = tensor.reshape(*shape[:axis], samples, self.factor, *shape[axis + 1 :])
            return unfolded.movedim((axis, axis + 1), (0, 1))
        unfolded = tensor.reshape(*shape[:axis], self.factor, samples, *shape[axis + 1 :])
        return unfolded.movedim((axis + 1, axis), (0, 1))


SHARED = SampleAxis(0, 0)
"""A tensor that does not depend on the batch: every sample has all of it."""


def find_axis(shapes: tuple[tuple[int, ...], tuple[int, ...]], channel_axis: int | None = None) -> SampleAxis | str:
    """Returns the sample axis of a tensor with these shapes at the two trace batches, or why there is none.

    Args:
        shapes: the tensor's shape at TRACE_BATCHES[0] and TRACE_BATCHES[1] images.
        channel_axis: an axis (negative: from the end) that cannot be the sample axis.
    """
    first, second = shapes
    if len(first) != len(second):
        return "its number of dimensions changes with the batch"
    growing = [d for d, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    if not growing:
        return "its input has no sample axis"
    if len(growing) > 1:
        return "more than one axis of its input grows with the batch"
    axis = growing[0]
    if channel_axis is not None and axis == channel_axis % len(first):
        return "the samples are on the channel axis of its input"
    if first[axis] * TRACE_BATCHES[1] != second[axis] * TRACE_BATCHES[0] or first[axis] % TRACE_BATCHES[0]:
        return "the axis that grows with the batch is not a multiple of it"
    return SampleAxis(axis, first[axis] // TRACE_BATCHES[0])
