"""The values of the proxies of one network, and what each of them cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..clock import Clock
from .evidence import Evidence
from .proxy import Need, Proxy, UnavailableError


def evaluate(proxies: Sequence[Proxy], evidence: Evidence, clock: Clock) -> tuple[dict[str, float], list[str]]:
    """Returns the value of each proxy by name, and warnings about those that are NaN because they failed.

    One that fails takes none of the others with it; running out of memory is raised.
    """
    values, messages = {}, []
    for proxy in proxies:
        try:
            with clock(_own(proxy)):
                values[proxy.name] = float(proxy.value(evidence))
        except torch.OutOfMemoryError:
            raise
        except UnavailableError as reason:
            values[proxy.name] = math.nan
            messages.append(f"{proxy.name} has no value: {reason}")
        except Exception as error:
            values[proxy.name] = math.nan
            messages.append(f"{proxy.name} failed: {type(error).__name__}: {error}")
    return values, messages


def seconds(proxies: Sequence[Proxy], clock: Clock) -> dict[str, float]:
    """Returns the seconds that each proxy took by name, as if it alone had been asked for.

    That is the part of the shared pass that it needs (forward alone for patterns), what was collected on the way for
    its kind, and its own work. Moments of signed gradients come with those of |g|, so that a proxy that needs only the
    latter is shown with both where both were asked for; what several proxies compute together (the Jacobian at the
    images, say) is shown with the first of them.
    """
    spent: Mapping[str, float] = clock.seconds()
    forward = spent["trace"] + spent["forward"] + spent[Need.PATTERNS.name]
    found = {}
    for proxy in proxies:
        own: float = spent[_own(proxy)]
        if proxy.needs:
            own += forward
        kinds = {need.name for need in proxy.needs} - {Need.PATTERNS.name}
        if kinds:
            kinds = {Need.MOMENTS.name if kind == Need.SIGNED.name else kind for kind in kinds}
            own += spent["backward"] + sum(spent[kind] for kind in kinds)
        found[proxy.name] = own
    return found


def _own(proxy: Proxy) -> str:
    return f"proxy {proxy.name}"
