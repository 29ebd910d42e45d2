"""Checks of arguments that every search space takes."""

from __future__ import annotations

from ..errors import InputError


def check_sizes(**sizes: int) -> dict[str, int]:
    """Returns the options as they are; raises InputError unless each is a positive integer."""
    for option, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{option} must be a positive integer, got {value!r}")
    return sizes


def check_count(n: int, space: str, size: int) -> int:
    """Returns n; raises InputError unless a space of `size` candidates holds that many."""
    if not 0 <= n <= size:
        raise InputError(f"{space} holds {size} candidates; n must be from 0 to that, got {n}")
    return n


def check_seed(seed: int) -> int:
    """Returns the seed; raises InputError unless it is an integer from 0 to 2**63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
    return seed
