"""The proxies by name. One line a proxy; a module is imported when its proxy is asked for."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from ..errors import InputError
from .proxy import Need, Proxy

_HOMES = {
    "lswag": "lswag.Lswag",
    "lambda": "trainability.Trainability",
    "psi": "expressivity.Expressivity",
    "zico": "zico.Zico",
    "swap": "swap.Swap",
    "reg_swap": "reg_swap.RegSwap",
    "nwot": "nwot.Nwot",
    "grad_norm": "grad_norm.GradNorm",
    "snip": "snip.Snip",
    "plain": "plain.Plain",
    "fisher": "fisher.Fisher",
    "gradsign": "gradsign.GradSign",
    "gsnr": "gsnr.Gsnr",
    "l2_norm": "l2_norm.L2Norm",
    "jacov": "jacov.Jacov",
    "epe_nas": "epe_nas.EpeNas",
    "synflow": "synflow.Synflow",
    "grasp": "grasp.Grasp",
    "zen": "zen.Zen",
    "dss": "dss.Dss",
    "te_nas": "te_nas.TeNas",
    "te_nas_regions": "te_nas.TeNasRegions",
    "te_nas_ntk": "te_nas.TeNasNtk",
    "az_nas": "az_nas.AzNas",
    "az_nas_expressivity": "az_nas.Expressivity",
    "az_nas_progressivity": "az_nas.Progressivity",
    "az_nas_trainability": "az_nas.Trainability",
    "az_nas_complexity": "az_nas.Complexity",
    "tcet": "tcet.Tcet",
    "params": "params.Parameters",
    "flops": "flops.Flops",
}


def names() -> tuple[str, ...]:
    """Returns the name of every proxy."""
    return tuple(_HOMES)


def get(name: str) -> type[Proxy]:
    """Returns the class of a proxy; raises InputError for a name that is none."""
    if name not in _HOMES:
        raise InputError(f"no proxy is called {name!r}; there are {', '.join(_HOMES)}")
    module, kind = _HOMES[name].split(".")
    found: type[Proxy] = getattr(import_module(f".{module}", __package__), kind)
    return found


def lowest_is_best(described: Mapping[str, Any]) -> bool:
    """Returns whether the lowest value of a proxy is best, by its description in a run's options.

    A proxy of the user's own says so there; a name that is none is taken to be best at its highest.
    """
    name = described["name"]
    return get(name).lower_is_better if name in _HOMES else bool(described.get("lower_is_better"))


def is_registered(kind: type[Proxy]) -> bool:
    """Returns whether `kind` is the class that the registry knows under its name."""
    return f"{kind.__module__}.{kind.__qualname__}" == f"{__package__}.{_HOMES.get(kind.name)}"


def chosen(proxies: Sequence[str | Proxy] | str) -> tuple[Proxy, ...]:
    """Returns the proxies of a mixed sequence of names (default options) and proxies, in its order.

    Raises InputError for an unknown name, a value that is no proxy, a name that comes twice, a class of the user's own
    without a name, under the name of another proxy or with needs that are none, and options that are no fields of a
    frozen dataclass or that JSON cannot hold.
    """
    if isinstance(proxies, str | Proxy):
        raise InputError(f"proxies is a sequence of names or proxies, got {proxies!r}; write ({proxies!r},)")
    if not isinstance(proxies, Iterable):
        raise InputError(f"proxies is a sequence of names or proxies, got {proxies!r}")
    found = [p if isinstance(p, Proxy) else get(p) if isinstance(p, str) else p for p in proxies]
    taken: list[Proxy] = []
    for proxy in found:
        made = proxy() if isinstance(proxy, type) and issubclass(proxy, Proxy) else proxy
        if not isinstance(made, Proxy):
            raise InputError(f"proxies holds {made!r}, which is neither a name ({', '.join(_HOMES)}) nor a proxy")
        _check_identity(made)
        if made.name in (p.name for p in taken):
            raise InputError(f"proxies holds {made.name!r} twice; score twice for two sets of its options")
        taken.append(made)
    return tuple(taken)


def _check_identity(proxy: Proxy) -> None:
    """Raises InputError where name, class and fields do not tell what the proxy computes."""
    kind = type(proxy)
    if not isinstance(getattr(kind, "name", None), str):
        raise InputError(f"{kind.__qualname__} has no name to be known by; write name = '...' in it")
    if not isinstance(kind.needs, Collection) or not all(isinstance(need, Need) for need in kind.needs):
        raise InputError(
            f"{kind.__qualname__} needs {kind.needs!r}, which is no set of lswag_fast.proxies.Need; write "
            f"needs = frozenset({{Need.MOMENTS}}), say"
        )
    if proxy.name in _HOMES and not is_registered(kind):
        raise InputError(f"{kind.__qualname__} has the name {proxy.name!r} of another proxy; give it one of its own")
    own = vars(kind).get("__dataclass_params__")
    if vars(proxy) and not (own and own.frozen):
        raise InputError(
            f"{kind.__qualname__} has {', '.join(vars(proxy))} set, but is no frozen dataclass, so two sets of its "
            f"options could not be told apart; write @dataclass(frozen=True) above it and make them its fields"
        )
    try:
        json.dumps(proxy.to_dict())
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{kind.__qualname__} has an option that a store cannot keep ({error}); take numbers, texts and sequences "
            f"of them"
        ) from error
