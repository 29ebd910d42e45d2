"""What a tensor was computed from, read off its autograd graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_LOOKUPS = ("Index", "Embedding", "Gather", "Upsample")
_REARRANGEMENTS = (
    "TBackward",
    "Transpose",
    "Permute",
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Clone",
    "ToCopy",
    "Slice",
    "Select",
    "Squeeze",
    "Unsqueeze",
    "Alias",
    "Split",
    "Unbind",
    "Narrow",
    "Movedim",
)


@dataclass(frozen=True)
class Source:
    """The leaves behind a tensor."""

    samples: bool  # it depends on the images
    weights: frozenset[str]  # parameters, reached without a table lookup
    tables: frozenset[str]  # parameters reached through an index, an embedding or an interpolation

    @property
    def is_weight(self) -> bool:
        """Whether it was computed from parameters alone."""
        return not self.samples and bool(self.weights)


_NOTHING = Source(False, frozenset(), frozenset())


class Provenance:
    """Answers what tensors of one forward pass were computed from."""

    def __init__(self, leaves: dict[str, Tensor], images: Tensor) -> None:
        self._leaves = leaves
        # By storage, which also knows the views that were taken where autograd does not record.
        self._names = {leaf.untyped_storage()._cdata: name for name, leaf in leaves.items()}
        self._images = images
        self._memo: dict[Any, Source] = {}

    def name(self, tensor: Tensor) -> str | None:
        """Returns the name of the parameter that `tensor` is, or is a view of, if it is one."""
        return self._names.get(tensor.untyped_storage()._cdata)

    def leaf(self, name: str) -> Tensor:
        """Returns the leaf that stands for the parameter of this name."""
        return self._leaves[name]

    def of(self, tensor: Tensor) -> Source:
        """Returns the leaves that `tensor` was computed from."""
        if tensor.grad_fn is not None:
            return self._of_node(tensor.grad_fn)
        return self._of_leaf(tensor)

    def rearranged(self, tensor: Tensor) -> str | None:
        """Returns the parameter whose entries `tensor` holds, each at most once, moved or cast but nothing more."""
        node: Any = tensor.grad_fn
        while node is not None and not hasattr(node, "variable"):
            if not node.name().startswith(_REARRANGEMENTS):
                return None
            inputs = [n for n, _ in node.next_functions if n is not None]
            if len(inputs) != 1:
                return None
            node = inputs[0]
        return self.name(node.variable if node is not None else tensor)

    def reachable(self, outputs: Iterable[Tensor]) -> tuple[set[Any], set[str]]:
        """Returns the autograd nodes that a backward pass from `outputs` visits, and the parameters it reaches."""
        seen: set[Any] = set()
        names: set[str] = set()
        stack: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                name = self.name(node.variable)
                if name is not None:
                    names.add(name)
            stack.extend(n for n, _ in node.next_functions if n is not None and n not in seen)
        return seen, names

    def _of_leaf(self, tensor: Tensor) -> Source:
        if tensor is self._images:
            return Source(True, frozenset(), frozenset())
        name = self.name(tensor)
        return _NOTHING if name is None else Source(False, frozenset([name]), frozenset())

    def _of_node(self, root: Any) -> Source:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._memo:
                stack.pop()
                continue
            if hasattr(node, "variable"):
                self._memo[node] = self._of_leaf(node.variable)
                continue
            inputs = [n for n, _ in node.next_functions if n is not None]
            pending = [n for n in inputs if n not in self._memo]
            if pending:
                stack.extend(pending)
                continue
            self._memo[node] = self._combined(node, [self._memo[n] for n in inputs])
        return self._memo[root]

    @staticmethod
    def _combined(node: Any, sources: list[Source]) -> Source:
        if any(s.samples for s in sources):
            return Source(True, frozenset(), frozenset())
        weights: frozenset[str] = frozenset().union(*(s.weights for s in sources))
        tables: frozenset[str] = frozenset().union(*(s.tables for s in sources))
        if node.name().startswith(_LOOKUPS):
            return Source(False, frozenset(), weights | tables)
        return Source(False, weights, tables)
