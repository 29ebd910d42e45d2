"""Distinct random draws from spaces of billions of candidates, in constant memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

_MASK = (1 << 64) - 1
_ROUNDS = 8


def distinct_draws(strata: Sequence[tuple[int, int]], seed_text: str) -> Iterator[tuple[int, int]]:
    """Yields every (stratum, index) once, in a random order fixed by `seed_text`.

    A draw picks a stratum uniformly among those that still have candidates, then the next index of that stratum's own
    random permutation. The permutations are keyed Feistel networks, so nothing is remembered but one counter a
    stratum: no draw repeats, and a million of them take no more memory than one.

    Args:
        strata: (left, right) factors; stratum s holds the indices 0 .. left * right - 1.
        seed_text: names the stream; equal texts give equal streams, on any machine and Python version.
    """
    choice_key = _keys(f"{seed_text}/stratum")[0]
    keys = [_keys(f"{seed_text}/{stratum}") for stratum in range(len(strata))]
    used = [0] * len(strata)
    open_strata = list(range(len(strata)))
    draw = 0
    while open_strata:
        stratum = open_strata[_mix(draw ^ choice_key) % len(open_strata)]
        draw += 1
        left, right = strata[stratum]
        yield stratum, permuted(used[stratum], left, right, keys[stratum])
        used[stratum] += 1
        if used[stratum] == left * right:
            open_strata.remove(stratum)


def permuted(index: int, left: int, right: int, keys: Sequence[int]) -> int:
    """Returns the image of `index` under a keyed permutation of 0 .. left * right - 1.

    An unbalanced Feistel network over the two digits of `index`, modular addition in place of exclusive or, so that
    the sizes need not be powers of two. `keys` are an even number of 64-bit integers, one a round.
    """
    high, low = divmod(index, right)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        high = (high + _mix(low ^ first)) % left
        low = (low + _mix(high ^ second)) % right
    return high * right + low


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _keys(text: str) -> tuple[int, ...]:
    digest = hashlib.sha512(text.encode()).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))
