"""What a score is computed with: the options of `score`, checked and resolved."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from .errors import InputError
from .ops.activation_patterns import MAX_SAMPLES
from .proxies import registry
from .proxies.proxy import Need, Proxy

Pooling = Literal["union", "sum"]
Numerator = Literal["one", "mean"]

DTYPES = ("auto", "float32", "bfloat16")
POOLINGS = ("union", "sum")
NUMERATORS = ("one", "mean")
LSWAG = {"name": "lswag"}
"""L-SWAG among the options' plain values; a store's settings leave `proxies` out where it is there alone."""
DEFINITION_VERSION = 1
"""Raised whenever the same candidate, batch and options would score differently."""


@dataclass(frozen=True)
class ScoreOptions:
    """Options of one score; see :func:`lswag_fast.score` for their meaning.

    `resolved` replaces every "decide for me" value (`groups=None`, `dtype="auto"`, `device="auto"`,
    `pattern_samples=None`) by the value that is used, which is what a store's key is made of.
    """

    groups: int | None = None
    window: tuple[int, int] = (0, 100)
    pooling: Pooling = "union"
    pattern_samples: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    numerator: Numerator = "one"
    patterns_inside_window: bool = False
    extra_parameters: Sequence[str] = ()
    proxies: Sequence[str | Proxy] = ("lswag",)

    def __post_init__(self) -> None:
        for name in ("groups", "pattern_samples"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _integer(name, getattr(self, name)))
        object.__setattr__(self, "seed", _integer("seed", self.seed))
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed}")
        object.__setattr__(self, "device", str(self.device))
        if isinstance(self.extra_parameters, str):
            raise InputError(f"extra_parameters is a sequence of names, got the text {self.extra_parameters!r}")
        object.__setattr__(self, "extra_parameters", tuple(self.extra_parameters))
        if not isinstance(self.window, tuple | list) or len(self.window) != 2:
            raise InputError(f"window is (first, last) in percent of depth, got {self.window!r}")
        object.__setattr__(self, "window", tuple(_integer("each end of window", end) for end in self.window))
        if not 0 <= self.window[0] <= self.window[1] <= 100:
            raise InputError(
                f"window is (first, last) in percent of depth with 0 <= first <= last <= 100, got {self.window}"
            )
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("numerator", self.numerator, NUMERATORS)
        _one_of("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "proxies", registry.chosen(self.proxies))

    @property
    def chosen(self) -> tuple[Proxy, ...]:
        """`proxies`, each with its options, as this was made."""
        return cast(tuple[Proxy, ...], self.proxies)

    def needs(self, *, whole: bool = False) -> frozenset[Need]:
        """Returns what the proxies need from the shared pass; `whole`: those that look at the whole network alone."""
        return frozenset().union(*(p.needs for p in self.chosen if p.whole or not whole))

    def resolved(self, samples: int, *, coupled: bool = False) -> ScoreOptions:
        """Returns these options with every automatic value decided for a batch of `samples` images.

        Raises InputError where they do not fit the batch: S outside 2..1024, S not divisible by G, G below 2,
        pattern_samples outside 2..S, or a device that no backend of this build computes on.
        """
        from . import backends

        if not 2 <= samples <= MAX_SAMPLES:
            raise InputError(
                f"a score needs 2 to {MAX_SAMPLES} images (sigma and patterns compare samples), got S = {samples}"
            )
        if coupled and self.groups is None and (samples < 4 or samples % 2):
            raise InputError(
                f"samples are coupled (batch normalisation in training mode), so the score takes two groups, each its "
                f"own pass, and needs an even number of images from 4 on, got S = {samples}; pass other images, groups "
                f"that divide S, or call model.eval() first"
            )
        groups = self.groups if self.groups is not None else (2 if coupled else samples)
        if groups < 2 or samples % groups:
            divisors = ", ".join(str(g) for g in range(2, samples + 1) if samples % g == 0)
            raise InputError(f"groups must be 2 or more and divide S = {samples} ({divisors}), got {groups}")
        if coupled and groups == samples:
            raise InputError(
                f"groups = {groups} of S = {samples} images asks for the gradient of each sample alone, which a model "
                f"whose samples are coupled does not have; pass groups=2 (the default there) with 4 images or more, "
                f"or call model.eval() first"
            )
        pattern_samples = samples if self.pattern_samples is None else self.pattern_samples
        if not 2 <= pattern_samples <= samples:
            raise InputError(f"pattern_samples must be from 2 to S = {samples}, got {pattern_samples}")
        device = backends.resolve_device(self.device)
        return replace(
            self,
            groups=groups,
            pattern_samples=pattern_samples,
            device=device,
            dtype=backends.resolve_dtype(self.dtype, device),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as plain values that JSON can hold."""
        plain = asdict(replace(self, proxies=()))
        return plain | {"proxies": sorted((p.to_dict() for p in self.chosen), key=_name)}


def _name(proxy: dict[str, Any]) -> str:
    return str(proxy["name"])


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be an integer, got {value!r}") from None


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
