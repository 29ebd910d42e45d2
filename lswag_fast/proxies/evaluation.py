"""The values of the proxies of one network, and what each of them cost."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..clock import Clock
from ..errors import is_out_of_memory
from .evidence import Evidence
from .proxy import OF_GRADIENTS, OF_PATTERNS, Need, Proxy, UnavailableError
from .shared_work import label


@dataclass
class Values:
    """The values of proxies by name, NaN where one failed, warnings about those, and the work that each shared."""

    values: dict[str, float] = field(default_factory=dict)
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    shared: dict[str, set[Hashable]] = field(default_factory=dict)


def evaluate(proxies: Sequence[Proxy], evidence: Evidence, clock: Clock) -> Values:
    """Returns the value of each proxy. One that fails takes none of the others with it."""
    found = Values()
    for proxy in proxies:
        evidence.shared.used.clear()
        evidence.reader = proxy
        try:
            with clock.on_host(_own(proxy)) if proxy.from_pass else clock(_own(proxy)):
                found.values[proxy.name] = _value(proxy, evidence)
            if math.isnan(found.values[proxy.name]):
                found.messages.append(f"{proxy.name} has no value: it is NaN")
            found.shared[proxy.name] = set(evidence.shared.used)
            if details := proxy.details(evidence):
                found.details[proxy.name] = details
            continue
        except UnavailableError as reason:
            found.messages.append(f"{proxy.name} has no value: {reason}")
        except Exception as error:
            hint = "; what it does not need is None" if "'NoneType'" in str(error) else ""
            first_line = str(error).partition("\n")[0]
            found.messages.append(f"{proxy.name} failed: {type(error).__name__}: {first_line}{hint}")
        found.values[proxy.name] = math.nan
        found.shared[proxy.name] = set(evidence.shared.used)
    return found


def _value(proxy: Proxy, evidence: Evidence) -> float:
    """Returns the value, at the second attempt where memory runs out at the first."""
    try:
        return float(proxy.value(evidence))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # What the first attempt held is free now that its error is.
    torch.cuda.empty_cache()
    return float(proxy.value(evidence))


def seconds(proxies: Sequence[Proxy], found: Values, clock: Clock) -> dict[str, float]:
    """Returns the seconds that each proxy took by name, as if it alone had been asked for.

    That is the part of L-SWAG's pass that it needs (forward alone for patterns), what was collected on the way for its
    kind, the passes that it shares with other proxies, and its own work. Moments of signed gradients, and the gradient
    of the whole batch, come with those of |g|, so that a proxy that needs only the latter is shown with all that was
    asked for.
    """
    spent: Mapping[str, float] = clock.seconds()
    forward = spent["trace"] + spent["forward"] + spent[Need.PATTERNS.name]
    took = {}
    for proxy in proxies:
        own = spent[_own(proxy)] + sum(spent[label(key)] for key in found.shared[proxy.name])
        needs = frozenset(proxy.needs)
        if needs & (OF_PATTERNS | OF_GRADIENTS):
            own += forward
        kinds = needs - OF_PATTERNS
        if kinds & {Need.SIGNED, Need.GRADIENT}:
            kinds |= {Need.MOMENTS}
        if kinds & OF_GRADIENTS:
            own += spent["backward"]
        own += sum(spent[kind.name] for kind in kinds)
        took[proxy.name] = own
    return took


def _own(proxy: Proxy) -> str:
    return f"proxy {proxy.name}"
