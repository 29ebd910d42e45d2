"""Work that several proxies of one score share: done once, and charged to each of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from ..clock import Clock


class SharedWork:
    """Results by key, and who asked for which.

    `used` holds the keys that were asked for, with those that their results are made of; whoever measures a proxy
    empties it before.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.used: set[Hashable] = set()
        self._clock = clock or Clock("cpu", running=False)
        self._results: dict[Hashable, Any] = {}
        self._made_of: dict[Hashable, set[Hashable]] = {}

    def note(self, key: Hashable) -> None:
        """Counts the work with this key, which was done elsewhere, among what was asked for."""
        self.used.add(key)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Returns compute(), which is called for the first request with this key only."""
        if key not in self._results:
            outer, self.used = self.used, set()
            try:
                with self._clock(label(key)):
                    self._results[key] = compute()
                self._made_of[key] = {key, *self.used}
            finally:
                self.used = outer
        self.used |= self._made_of[key]
        return self._results[key]


def label(key: Hashable) -> str:
    """Returns the label under which a clock counts the work with this key."""
    return f"shared {key}"
