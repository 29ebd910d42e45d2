"""Work that several proxies of one network have in common, done once a network."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from .network import Network

Result = TypeVar("Result")


def once_a_network(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps what compute(network, *options) returns for as long as the network lives; options must be hashable."""
    kept: WeakKeyDictionary[Network, dict[tuple[Any, ...], Result]] = WeakKeyDictionary()

    @wraps(compute)
    def shared(network: Network, *options: Any) -> Result:
        results = kept.setdefault(network, {})
        if options not in results:
            results[options] = compute(network, *options)
        return results[options]

    return shared
