"""The values of the proxies of one network, and what each of them cost."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..clock import Clock
from .evidence import Evidence
from .network import shared_label
from .proxy import Need, Proxy, UnavailableError


@dataclass
class Values:
    """The values of proxies by name, NaN where one failed, warnings about those, and the passes that each shared."""

    values: dict[str, float] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    shared: dict[str, set[Hashable]] = field(default_factory=dict)


def evaluate(proxies: Sequence[Proxy], evidence: Evidence, clock: Clock) -> Values:
    """Returns the value of each proxy. One that fails takes none of the others with it; out of memory is raised."""
    found = Values()
    for proxy in proxies:
        evidence.shared.clear()
        try:
            with clock(_own(proxy)):
                found.values[proxy.name] = float(proxy.value(evidence))
        except torch.OutOfMemoryError:
            raise
        except UnavailableError as reason:
            found.values[proxy.name] = math.nan
            found.messages.append(f"{proxy.name} has no value: {reason}")
        except Exception as error:
            found.values[proxy.name] = math.nan
            found.messages.append(f"{proxy.name} failed: {type(error).__name__}: {error}")
        found.shared[proxy.name] = set(evidence.shared)
    return found


def seconds(proxies: Sequence[Proxy], found: Values, clock: Clock) -> dict[str, float]:
    """Returns the seconds that each proxy took by name, as if it alone had been asked for.

    That is the part of L-SWAG's pass that it needs (forward alone for patterns), what was collected on the way for its
    kind, the passes that it shares with other proxies, and its own work. Moments of signed gradients come with those of
    |g|, so that a proxy that needs only the latter is shown with both where both were asked for.
    """
    spent: Mapping[str, float] = clock.seconds()
    forward = spent["trace"] + spent["forward"] + spent[Need.PATTERNS.name]
    took = {}
    for proxy in proxies:
        own = spent[_own(proxy)] + sum(spent[shared_label(key)] for key in found.shared[proxy.name])
        if proxy.needs:
            own += forward
        kinds = {need.name for need in proxy.needs} - {Need.PATTERNS.name}
        if kinds:
            kinds = {Need.MOMENTS.name if kind == Need.SIGNED.name else kind for kind in kinds}
            own += spent["backward"] + sum(spent[kind] for kind in kinds)
        took[proxy.name] = own
    return took


def _own(proxy: Proxy) -> str:
    return f"proxy {proxy.name}"
