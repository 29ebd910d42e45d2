"""The NAS-Bench-201 search space (Dong, Yang, ICLR 2020): all 15,625 cells of five operations on six edges."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise, product
from typing import Any

from ..errors import InputError
from .checks import check_count, check_seed, check_sizes
from .nasbench201_module import (
    CELLS_A_STAGE,
    CHANNELS,
    CONV_1X1,
    CONV_3X3,
    EDGES,
    FORWARD_ORDER,
    IMAGE_CHANNELS,
    NASBench201,
)
from .sampling import distinct_draws

NAME = "nasbench201"
OPERATIONS = ("skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3")
"""The published name of each operation, by its index."""

Arch = dict[str, Any]
"""A canonical candidate: {"ops": [int, ...]}, an index into `OPERATIONS` for each of `EDGES`."""

_FORMS = (
    'six operation indices such as (0, 2, 3, 2, 3, 1), or the published form "|nor_conv_3x3~0|+|none~0|none~1|+|...|"'
)


class NASBench201Space:
    """The NAS-Bench-201 space at one image size; see :func:`lswag_fast.spaces.get`.

    A candidate is six operation indices (0 skip, 1 zero, 2 3x3 convolution, 3 1x1 convolution, 4 3x3 average pooling)
    for the edges (0,1) (0,2) (0,3) (1,2) (1,3) (2,3) between the nodes of a cell, as in NAS-Bench-Suite-Zero. Methods
    take it as a tuple or list, as the text "(0, 2, 3, 2, 3, 1)", as {"ops": [0, 2, 3, 2, 3, 1]}, or in the published
    form, "|nor_conv_3x3~0|+|nor_conv_3x3~0|skip_connect~1|+|...|". Iteration yields all candidates in order.

    Two candidates that compute the same function are two candidates, as in the published tables.
    """

    coupled = True
    """Batch normalisation is in training mode, so the samples of a batch influence each other."""

    name = NAME
    size = len(OPERATIONS) ** len(EDGES)
    """The number of candidates."""

    def __init__(self, *, image_size: int = 32, num_classes: int = 10) -> None:
        self._sizes = check_sizes(image_size=image_size, num_classes=num_classes)
        if image_size % 4:
            raise InputError(f"image_size must be a multiple of 4, for it is halved twice, got {image_size}")

    @property
    def options(self) -> dict[str, Any]:
        """The name and the resolved options: `spaces.get(**space.options)` is this space again."""
        return {"name": self.name, **self._sizes}

    def __iter__(self) -> Iterator[Arch]:
        return ({"ops": list(ops)} for ops in product(range(len(OPERATIONS)), repeat=len(EDGES)))

    def sample(self, n: int, seed: int = 0) -> Iterator[Arch]:
        """Returns an iterator of n distinct candidates, drawn uniformly, in constant memory.

        `sample(m, seed)` is a prefix of `sample(n, seed)` for m < n.

        Raises:
            InputError: n is negative or more than the space holds, or the seed is not an integer from 0 to 2**63 - 1.
        """
        side = len(OPERATIONS) ** (len(EDGES) // 2)
        draws = distinct_draws([(side, side)], f"{self.name}/{check_seed(seed)}")
        return (_at(index) for _, index in islice(draws, check_count(n, self.name, self.size)))

    def canonical(self, arch: Any) -> Arch:
        """Returns the canonical form of a candidate, {"ops": [six indices]}.

        Raises:
            InputError: it has none of the accepted forms, or an operation that is not in the space.
        """
        if isinstance(arch, Mapping):
            if arch.keys() != {"ops"}:
                raise InputError(f"an arch of {self.name} is a dict with ops alone, got {', '.join(map(str, arch))}")
            arch = arch["ops"]
        indices = _parsed(arch) if isinstance(arch, str) else arch
        if not isinstance(indices, Sequence) or len(indices) != len(EDGES):
            raise InputError(f"an arch of {self.name} is {_FORMS}; got {arch!r}")
        return {"ops": [_index(edge, operation) for edge, operation in zip(EDGES, indices, strict=True)]}

    def encode(self, arch: Any) -> str:
        """Returns the candidate as published tables key it, "(0, 2, 3, 2, 3, 1)", whatever its spelling."""
        return str(tuple(self.canonical(arch)["ops"]))

    def decode(self, text: str) -> Arch:
        """Returns the canonical candidate that `text`, in any accepted form or as JSON, stands for."""
        if not text.lstrip().startswith(("{", '"')):
            return self.canonical(text)
        try:
            return self.canonical(json.loads(text))
        except json.JSONDecodeError as error:
            raise InputError(f"an encoded arch is {_FORMS}, or JSON of it; got {text!r} ({error})") from error

    def published_form(self, arch: Any) -> str:
        """Returns the candidate as the NAS-Bench-201 files spell it, "|nor_conv_3x3~0|+|none~0|none~1|+|...|"."""
        operations = self.canonical(arch)["ops"]
        nodes: dict[int, list[str]] = {}
        for edge in FORWARD_ORDER:
            start, end = EDGES[edge]
            nodes.setdefault(end, []).append(f"{OPERATIONS[operations[edge]]}~{start}")
        return "+".join(f"|{'|'.join(node)}|" for node in nodes.values())

    def params(self, arch: Any) -> int:
        """Returns the number of parameters of a candidate, those of batch normalisation included."""
        operations = self.canonical(arch)["ops"]
        wide, narrow = operations.count(CONV_3X3), operations.count(CONV_1X1)
        first, last = CHANNELS[0], CHANNELS[-1]
        total = 9 * IMAGE_CHANNELS * first + 2 * first + 2 * last + (last + 1) * self._sizes["num_classes"]
        for c in CHANNELS:
            total += CELLS_A_STAGE * ((9 * wide + narrow) * c * c + 2 * c * (wide + narrow))
        for c_in, c in pairwise(CHANNELS):
            total += 9 * c_in * c + 9 * c * c + c_in * c + 4 * c
        return int(total)

    def macs(self, arch: Any) -> int:
        """Returns the multiply-adds of one image: convolutions and the classifier."""
        operations = self.canonical(arch)["ops"]
        a_place = 9 * operations.count(CONV_3X3) + operations.count(CONV_1X1)
        side = self._sizes["image_size"]
        total = 9 * IMAGE_CHANNELS * CHANNELS[0] * side**2 + CHANNELS[-1] * self._sizes["num_classes"]
        for stage, c in enumerate(CHANNELS):
            area = (side >> stage) ** 2
            total += CELLS_A_STAGE * a_place * c * c * area
            if stage:
                c_in = CHANNELS[stage - 1]
                total += (9 * c_in * c + 9 * c * c + c_in * c) * area
        return int(total)

    def build(self, arch: Any, seed: int = 0) -> NASBench201:
        """Returns the candidate in training mode, with PyTorch's default weights drawn from `seed`."""
        network = NASBench201(self.canonical(arch)["ops"], **self._sizes)
        network.draw_parameters(check_seed(seed))
        return network


def _at(index: int) -> Arch:
    operations: list[int] = []
    for _ in EDGES:
        index, operation = divmod(index, len(OPERATIONS))
        operations.append(operation)
    return {"ops": operations}


def _index(edge: tuple[int, int], operation: Any) -> int:
    for index in range(len(OPERATIONS)):
        if operation == index and not isinstance(operation, bool):
            return index
    named = ", ".join(f"{index} {name}" for index, name in enumerate(OPERATIONS))
    raise InputError(f"the operation of edge {edge} of {NAME} must be one of {named}; got {operation!r}")


def _parsed(text: str) -> list[Any]:
    """Reads six indices, in parentheses, in brackets or bare, or the published form."""
    if re.fullmatch(r"\s*[\[(]?\s*\d+(\s*,\s*\d+)*\s*[\])]?\s*", text):
        return [int(digits) for digits in re.findall(r"\d+", text)]
    named = {
        (int(start), end): name
        for end, node in enumerate(text.strip().split("+"), start=1)
        for name, start in re.findall(r"\|(\w+)~(\d+)(?=\|)", node)
    }
    if text.strip().count("~") != len(EDGES) or named.keys() != set(EDGES):
        raise InputError(f"an arch of {NAME} is {_FORMS}; got {text!r}")
    return [OPERATIONS.index(name) if name in OPERATIONS else name for name in map(named.__getitem__, EDGES)]
