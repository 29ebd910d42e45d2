"""Which weights of a network are those of its attention, read off the autograd graph of one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_PRODUCTS = ("MmBackward", "AddmmBackward", "BmmBackward", "BaddbmmBackward", "LinearBackward", "ConvolutionBackward")
_IMAGES = object()
_ATTENTION = object()
_Marks = frozenset[Any]


def attention_weights(output: Tensor, weights: Mapping[str, Tensor], images: Tensor) -> frozenset[str]:
    """Returns the names of the weights that project the operands of an attention product, or its result.

    An attention product multiplies two tensors that were both computed from the images: queries by keys, or
    probabilities by values. A weight is of attention where no other weight lies between it and such a product.
    `output` was computed from `weights` and `images`, leaves that require gradients.
    """
    walk = _Walk({id(weight): name for name, weight in weights.items()}, images)
    walk.marks_of(output.grad_fn)
    return frozenset(walk.found)


class _Walk:
    """Marks every node of a graph with the last weights before it, the images, and attention since those weights."""

    def __init__(self, names: Mapping[int, str], images: Tensor) -> None:
        self.found: set[str] = set()
        self._names = names
        self._images = images
        self._marks: dict[Any, _Marks] = {}

    def marks_of(self, root: Any) -> _Marks:
        """Returns the marks of a node, after marking all before it."""
        stack = [root]
        while stack:
            node = stack[-1]
            inputs = [n for n, _ in node.next_functions if n is not None]
            pending = [n for n in inputs if n not in self._marks]
            if pending and node not in self._marks:
                stack.extend(pending)
                continue
            stack.pop()
            if node not in self._marks:
                self._marks[node] = self._marked(node, [self._marks[n] for n in inputs])
        return self._marks[root]

    def _marked(self, node: Any, inputs: list[_Marks]) -> _Marks:
        if hasattr(node, "variable"):
            name = self._names.get(id(node.variable))
            return frozenset([_IMAGES] if node.variable is self._images else [] if name is None else [name])
        data = frozenset().union(*(marks for marks in inputs if _IMAGES in marks))
        if not data:
            return frozenset().union(*inputs)
        fused = "Attention" in node.name()
        if fused or (node.name().startswith(_PRODUCTS) and sum(_IMAGES in marks for marks in inputs) > 1):
            self.found |= {mark for mark in data if isinstance(mark, str)}
            return frozenset([_IMAGES, _ATTENTION])
        weights = frozenset().union(*(marks for marks in inputs if _IMAGES not in marks))
        if not (weights and node.name().startswith(_PRODUCTS)):
            return data
        if _ATTENTION in data:
            self.found |= weights
        return frozenset([_IMAGES]) | weights
