"""The AutoFormer search spaces (Chen et al., ICCV 2021): Tiny, Small and Base, and their weight-entangled supernets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from .autoformer_module import (
    HEAD_DIM,
    IMAGE_CHANNELS,
    TABLE_ROWS,
    AutoFormer,
    draw_parameters,
    mlp_width,
    parameter_shapes,
)
from .checks import check_count, check_seed, check_sizes
from .sampling import distinct_draws

Arch = dict[str, Any]
"""A canonical candidate: {"embed_dim": int, "depth": int, "num_heads": [int, ...], "mlp_ratio": [float, ...]}."""

_Choice = TypeVar("_Choice", int, float)


@dataclass(frozen=True)
class Choices:
    """What one space lets a candidate choose, and the dimensions of its supernet."""

    embed_dim: tuple[int, ...]
    depth: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: tuple[float, ...]
    supernet_embed_dim: int


CHOICES = {
    "autoformer-tiny": Choices((192, 216, 240), (12, 13, 14), (3, 4), (3.5, 4.0), 256),
    "autoformer-small": Choices((320, 384, 448), (12, 13, 14), (5, 6, 7), (3.0, 3.5, 4.0), 448),
    "autoformer-base": Choices((528, 576, 624), (14, 15, 16), (9, 10), (3.0, 3.5, 4.0), 640),
}


class AutoFormerSpace:
    """An AutoFormer space at one image size; see :func:`lswag_fast.spaces.get`."""

    coupled = False
    """Samples of a batch do not influence each other: there is no batch normalisation."""

    def __init__(self, name: str, *, image_size: int = 224, patch_size: int = 16, num_classes: int = 1000) -> None:
        if name not in CHOICES:
            raise InputError(f"no search space is called {name!r}; there are {', '.join(CHOICES)}")
        self._sizes = check_sizes(image_size=image_size, patch_size=patch_size, num_classes=num_classes)
        if image_size % patch_size:
            raise InputError(f"image_size must be a multiple of patch_size ({patch_size}), got {image_size}")
        self.name = name
        self.choices = CHOICES[name]

    @property
    def options(self) -> dict[str, Any]:
        """The name and the resolved options: `spaces.get(**space.options)` is this space again."""
        return {"name": self.name, **self._sizes}

    @property
    def size(self) -> int:
        """The number of candidates."""
        per_layer = self._layer_choices
        return len(self.choices.embed_dim) * sum(int(per_layer**depth) for depth in self.choices.depth)

    @property
    def _layer_choices(self) -> int:
        return len(self.choices.num_heads) * len(self.choices.mlp_ratio)

    def sample(self, n: int, seed: int = 0) -> Iterator[Arch]:
        """Returns an iterator of n distinct candidates, in constant memory.

        Embedding, depth, and each layer's heads and ratio are drawn uniformly, each by itself. `sample(m, seed)` is a
        prefix of `sample(n, seed)` for m < n. Nothing drawn is remembered (see :func:`.sampling.distinct_draws`).

        Raises:
            InputError: n is negative or more than the space holds, or the seed is not an integer from 0 to 2**63 - 1.
        """
        check_count(n, self.name, self.size)
        check_seed(seed)
        strata = [(embed, depth) for embed in self.choices.embed_dim for depth in self.choices.depth]
        factors = [
            (self._layer_choices ** (depth // 2), self._layer_choices ** (depth - depth // 2)) for _, depth in strata
        ]
        draws = distinct_draws(factors, f"{self.name}/{int(seed)}")
        return (self._at(*strata[stratum], index) for stratum, index in islice(draws, n))

    def _at(self, embed: int, depth: int, index: int) -> Arch:
        heads: list[int] = []
        ratios: list[float] = []
        for _ in range(depth):
            index, digit = divmod(index, self._layer_choices)
            head, ratio = divmod(digit, len(self.choices.mlp_ratio))
            heads.append(self.choices.num_heads[head])
            ratios.append(self.choices.mlp_ratio[ratio])
        return {"embed_dim": embed, "depth": depth, "num_heads": heads, "mlp_ratio": ratios}

    def canonical(self, arch: Mapping[str, Any]) -> Arch:
        """Returns the canonical form of a candidate.

        `hidden_dim`, as published tables spell it, is taken for `embed_dim`; entries of `num_heads` and `mlp_ratio`
        beyond `depth` are unused, and left out.

        Raises:
            InputError: a field is missing, unknown or has a value outside the space; the message names it.
        """
        if not isinstance(arch, Mapping):
            raise InputError(
                f"an arch is a dict with embed_dim, depth, num_heads and mlp_ratio, got {type(arch).__name__}"
            )
        fields = dict(arch)
        if "hidden_dim" in fields and "embed_dim" in fields:
            raise InputError("arch has both embed_dim and hidden_dim, which mean the same; give one")
        if "hidden_dim" in fields:
            fields["embed_dim"] = fields.pop("hidden_dim")
        expected = {"embed_dim", "depth", "num_heads", "mlp_ratio"}
        if fields.keys() != expected:
            missing, unknown = sorted(expected - fields.keys()), sorted(map(str, fields.keys() - expected))
            raise InputError(
                f"an arch has exactly embed_dim, depth, num_heads and mlp_ratio; "
                f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        depth = self._one_of("depth", fields["depth"], self.choices.depth)
        return {
            "embed_dim": self._one_of("embed_dim", fields["embed_dim"], self.choices.embed_dim),
            "depth": depth,
            "num_heads": self._list_of("num_heads", fields["num_heads"], self.choices.num_heads, depth),
            "mlp_ratio": self._list_of("mlp_ratio", fields["mlp_ratio"], self.choices.mlp_ratio, depth),
        }

    def _list_of(self, field: str, values: Any, allowed: tuple[_Choice, ...], depth: int) -> list[_Choice]:
        if not isinstance(values, (list, tuple)):
            raise InputError(f"{field} must be a list with one entry a layer ({depth}), got {values!r}")
        if len(values) < depth:
            raise InputError(f"{field} needs one entry a layer: depth is {depth}, got {len(values)} entries")
        return [self._one_of(f"{field}[{layer}]", value, allowed) for layer, value in enumerate(values[:depth])]

    def _one_of(self, field: str, value: Any, allowed: tuple[_Choice, ...]) -> _Choice:
        for choice in allowed:
            if value == choice:
                return choice
        raise InputError(f"{field} of {self.name} must be one of {', '.join(map(str, allowed))}, got {value!r}")

    def encode(self, arch: Mapping[str, Any]) -> str:
        """Returns the candidate as one line of JSON, the same for every spelling of the same candidate."""
        return json.dumps(self.canonical(arch), sort_keys=True, separators=(",", ":"))

    def decode(self, text: str) -> Arch:
        """Returns the canonical candidate that `text`, JSON in any accepted spelling, stands for."""
        try:
            arch = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"an encoded arch is one JSON object, got {text!r} ({error})") from error
        return self.canonical(arch)

    def params(self, arch: Mapping[str, Any]) -> int:
        """Returns the number of parameters of a candidate, biases, norms, tokens and tables included."""
        arch = self.canonical(arch)
        embed, patch = arch["embed_dim"], self._sizes["patch_size"]
        heads, hidden = self._totals(arch)
        inner = HEAD_DIM * heads
        # Patch kernel and bias, class token, position embedding, final norm, head; then all layers together.
        ends = embed * (IMAGE_CHANNELS * patch * patch + 1 + 1 + self._tokens + 2)
        head = (embed + 1) * self._sizes["num_classes"]
        norms_and_tables = arch["depth"] * (4 * embed + 4 * TABLE_ROWS * HEAD_DIM)
        attention = 3 * inner * (embed + 1) + embed * inner + embed * arch["depth"]
        mlp = hidden * (embed + 1) + embed * hidden + embed * arch["depth"]
        return int(ends + head + norms_and_tables + attention + mlp)

    def macs(self, arch: Mapping[str, Any]) -> int:
        """Returns the multiply-adds of one image: patch convolution, Linear layers, attention and position products.

        Position products are those of this implementation: queries times each table, and probabilities summed by
        offset times each table, not the products with tables gathered for all pairs of tokens.
        """
        arch = self.canonical(arch)
        embed, patch, tokens = arch["embed_dim"], self._sizes["patch_size"], self._tokens
        heads, hidden = self._totals(arch)
        inner = HEAD_DIM * heads
        patches = (tokens - 1) * IMAGE_CHANNELS * patch * patch * embed
        linear = tokens * (4 * inner * embed + 2 * hidden * embed)
        attention = 2 * tokens * tokens * inner
        positions = 4 * TABLE_ROWS * tokens * inner
        return int(patches + linear + attention + positions + embed * self._sizes["num_classes"])

    @property
    def _tokens(self) -> int:
        return (self._sizes["image_size"] // self._sizes["patch_size"]) ** 2 + 1

    def _totals(self, arch: Arch) -> tuple[int, int]:
        """Returns heads and MLP hidden units, each summed over the layers."""
        return sum(arch["num_heads"]), sum(mlp_width(arch["embed_dim"], ratio) for ratio in arch["mlp_ratio"])

    def build(self, arch: Mapping[str, Any], seed: int = 0, supernet: AutoFormerSupernet | None = None) -> AutoFormer:
        """Returns a candidate that owns its parameters: drawn from `seed`, or copied from `supernet`.

        Fresh parameters are float32, drawn on the CPU; torch's global generator is left as it was.
        """
        if supernet is not None:
            _check_same_space(self, supernet)
            candidate = supernet.subnet(arch)
            with torch.no_grad():
                for parameter in candidate.parameters():
                    parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
            return candidate
        arch = self.canonical(arch)
        drawn = draw_parameters(self._shapes(arch), check_seed(seed))
        return self._module(arch, {name: nn.Parameter(value) for name, value in drawn.items()})

    def supernet(self, seed: int = 0, state_dict: Mapping[str, Any] | None = None) -> AutoFormerSupernet:
        """Returns the supernet: drawn from `seed`, or a copy of a published checkpoint in float32.

        Args:
            seed: an integer from 0 to 2**63 - 1; not used where a state dict is given.
            state_dict: name to tensor, or the published checkpoint that holds it under "model".

        Raises:
            InputError: keys are missing or unexpected, or a tensor has another shape.
        """
        shapes = self._shapes(self._supernet_arch())
        if state_dict is None:
            return AutoFormerSupernet(self, draw_parameters(shapes, check_seed(seed)))
        return AutoFormerSupernet(self, _checked_state(state_dict, shapes, self.name))

    def _supernet_arch(self) -> Arch:
        depth = max(self.choices.depth)
        return {
            "embed_dim": self.choices.supernet_embed_dim,
            "depth": depth,
            "num_heads": [max(self.choices.num_heads)] * depth,
            "mlp_ratio": [max(self.choices.mlp_ratio)] * depth,
        }

    def _shapes(self, arch: Arch) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(arch, **self._sizes)

    def _module(self, arch: Arch, parameters: Mapping[str, nn.Parameter]) -> AutoFormer:
        sizes = self._sizes
        return AutoFormer(arch, parameters, image_size=sizes["image_size"], patch_size=sizes["patch_size"])


class AutoFormerSupernet:
    """The full-size parameters of a space; every candidate is a view of them."""

    def __init__(self, space: AutoFormerSpace, parameters: Mapping[str, Tensor]) -> None:
        self.space = space
        self._parameters = dict(parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the parameters by their published names, not copied."""
        return dict(self._parameters)

    def subnet(self, arch: Mapping[str, Any]) -> AutoFormer:
        """Returns a candidate whose Parameters are views of this supernet's tensors: nothing is copied."""
        arch = self.space.canonical(arch)
        views: dict[str, nn.Parameter] = {}
        for name, shape in self.space._shapes(arch).items():
            full = self._parameters[name]
            # Every slice starts at 0 along every axis, so that one strided view does for all.
            views[name] = nn.Parameter(full.as_strided(shape, full.stride()))
        return self.space._module(arch, views)

    def cast(self, dtype: torch.dtype) -> AutoFormerSupernet:
        """Returns a supernet in `dtype`, cast once for all its candidates; this one is left as it is."""
        return AutoFormerSupernet(self.space, {name: value.to(dtype) for name, value in self._parameters.items()})

    def to(self, device: torch.device | str) -> AutoFormerSupernet:
        """Returns a supernet on `device`; tensors already there are shared, not copied."""
        return AutoFormerSupernet(self.space, {name: value.to(device) for name, value in self._parameters.items()})

    def digest(self) -> str:
        """Returns the SHA-256, in hexadecimal, of all names, dtypes, shapes and bytes; computed at each call."""
        sha = hashlib.sha256()
        for name, value in sorted(self._parameters.items()):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            sha.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()


def _checked_state(
    state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], space_name: str
) -> dict[str, Tensor]:
    state = state_dict.get("model", state_dict) if isinstance(state_dict, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError('a state dict maps names to tensors, or holds such a map under "model"')
    missing = [name for name in shapes if name not in state]
    unexpected = [str(name) for name in state if name not in shapes]
    if missing or unexpected:
        raise InputError(
            f"the state dict is not that of the {space_name} supernet: "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    misshaped = [
        f"{name} {list(state[name].shape)} (expected {list(shape)})"
        for name, shape in shapes.items()
        if tuple(state[name].shape) != shape
    ]
    if misshaped:
        raise InputError(
            f"the state dict does not fit the {space_name} supernet at these image_size, patch_size and num_classes: "
            f"{_some(misshaped)}"
        )
    return {name: state[name].detach().to("cpu", torch.float32, copy=True).contiguous() for name in shapes}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "none"
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _check_same_space(space: AutoFormerSpace, supernet: AutoFormerSupernet) -> None:
    if supernet.space.options != space.options:
        raise InputError(f"the supernet belongs to {supernet.space.options}, not to this space, {space.options}")
