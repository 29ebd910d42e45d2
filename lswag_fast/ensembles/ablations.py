"""LIBRA taken apart: the pairs and triples of proxies of L-SWAG's table 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from .. import proxies
from .information import Binning
from .libra import Combination, Combined, Pool, check_combination, weigh

GRADIENT_BASED: Mapping[str, bool] = MappingProxyType(
    {name: proxies.get(name).gradient_based for name in proxies.names()}
)
"""Whether a proxy of this library needs a backward pass (of the loss, or of outputs for a Jacobian)."""


def ablations(
    scores: Mapping[str, Sequence[float]],
    accuracy: Sequence[float],
    params: Sequence[float],
    *,
    oriented: bool = True,
    bins: int | None = None,
    binning: Binning = "frequency",
    bias: str | Sequence[float] = "params",
    combine: Combination = "rank_sum",
    resamples: int = 1000,
    gradient_based: Mapping[str, bool] = GRADIENT_BASED,
    seed: int = 0,
) -> dict[str, Combined]:
    """Returns the pairs and triples of L-SWAG's table 4, each combined as :func:`.libra.libra` combines its choice.

    The rules behind its rows are ours; "in reach" is a rho less than 0.1 below the highest:

    - "two gradient-free", "two gradient-based": the two of that kind with the highest rho; "one of each": the best of
      both kinds.
    - "two random": any two proxies; "random z3": LIBRA's pair and any other in reach (both by `seed`).
    - "maximal information gain", "minimal information gain": z1 and the one in reach of the highest or lowest gain.
      The latter is LIBRA "without z3", and named so, too.
    - "minimal bias": LIBRA's pair and the one in reach whose bias is nearest to 0; "matching bias": LIBRA itself.

    Where proxies are too few for a row, it combines those there are, and says so in its notes.

    `gradient_based` says whether a proxy needs gradients, proxies that it lacks being of neither kind; `seed` is of the
    random choices. The other arguments, and the errors, are those of `libra`.
    """
    check_combination(combine, resamples)
    pool = weigh(scores, accuracy, params, oriented=oriented, bins=bins, binning=binning, bias=bias)
    found = {}
    for name, (names, wanted) in _rows(pool, gradient_based, np.random.default_rng(seed)).items():
        few = f"{len(names)} of {wanted} proxies: no other is in reach or of the kind"
        notes = (*pool.notes, few) if len(names) < wanted else pool.notes
        score = pool.combine(names, combine) if names else np.full(len(pool.accuracy), np.nan)
        rho, interval = pool.judge(score, resamples) if names else (np.nan, (np.nan, np.nan))
        found[name] = Combined(tuple(names), score, rho, interval, notes)
    return found


def _rows(
    pool: Pool, gradient_based: Mapping[str, bool], generator: np.random.Generator
) -> dict[str, tuple[list[str], int]]:
    """Returns, for each row of the table, the proxies found and how many it should have."""
    ordered = sorted(pool.rho, key=pool.rho.__getitem__, reverse=True)
    free = [name for name in ordered if gradient_based.get(name) is False]
    based = [name for name in ordered if gradient_based.get(name) is True]
    two = generator.permutation(len(ordered))[:2]

    def in_reach(chosen: list[str], key: Callable[[str], float]) -> list[str]:
        others = [name for name in pool.near if name not in chosen]
        return chosen + ([min(others, key=key)] if others else [])

    pair = in_reach([pool.best], pool.gains.__getitem__)
    lottery = dict(zip(pool.near, generator.random(len(pool.near)), strict=True))
    return {
        "two gradient-free": (free[:2], 2),
        "two gradient-based": (based[:2], 2),
        "one of each": (free[:1] + based[:1], 2),
        "two random": ([ordered[i] for i in two], 2),
        "maximal information gain": (in_reach([pool.best], lambda name: -pool.gains[name]), 2),
        "minimal information gain": (pair, 2),
        "without z3": (pair, 2),
        "random z3": (in_reach(pair, lottery.__getitem__), 3),
        "minimal bias": (in_reach(pair, lambda name: abs(pool.biases[name])), 3),
        "matching bias": (in_reach(pair, lambda name: abs(pool.biases[name] - pool.accuracy_bias)), 3),
    }
