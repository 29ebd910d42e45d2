"""What the commands print for people: rankings, search spaces and checks; and as JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import InputError
from ..options import LSWAG
from ..records import Record
from ..store import Run, Store

_WIDTH_IN_A_PIPE = 160


def show_top(store: Path, n: int, context: str, by: str, *, as_json: bool) -> None:
    """Prints the `n` best candidates of the settings whose id begins with `context`, the newest by default."""
    from ..proxies.registry import lowest_is_best

    with Store(store, read_only=True) as opened:
        chosen = chosen_run(opened, context)
        by_context = _by_context(opened)
        options = chosen.metadata.get("options", {})
        kept = {proxy["name"]: proxy for proxy in options.get("proxies", [LSWAG])}
        best = opened.top(n, chosen.context, by=by, lowest=lowest_is_best(kept.get(by, {"name": by})))
        if not best and by in kept and by != "lswag":
            raise InputError(
                f"{by} has a value for no candidate of {store} with settings {chosen.context[:8]}; the warnings of "
                f"each say why: lswag-fast top --store {store} --context {chosen.context[:8]} --json"
            )
        if not best and by != "lswag":
            elsewhere = [context[:8] for context, run in by_context.items() if by in _proxies(run)]
            raise InputError(
                f"{store} holds no values of {by!r} with settings {chosen.context[:8]}, but of {', '.join(kept)}"
                + (f"; --context {' or '.join(elsewhere)} has them" if elsewhere else "")
            )
    if as_json:
        for record in best:
            print(json.dumps(record.to_dict(layers=False)))
        return
    ranking(best, by)
    if len(by_context) > 1:
        print("The store holds several settings, whose scores are not comparable; choose with --context:")
        for run in by_context.values():
            print(f"  {_settings(run)}{'  (shown)' if run.context == chosen.context else ''}")


def chosen_run(store: Store, context: str) -> Run:
    """Returns the run whose settings have an id that begins with `context`, the newest one by default."""
    chosen = [run for run in _by_context(store).values() if run.context.startswith(context)]
    if not chosen:
        raise InputError(f"{store.path} holds no scores{f' with settings {context}' if context else ''}")
    if context and len(chosen) > 1:
        raise InputError(f"{len(chosen)} settings begin with {context}; give more characters of the id")
    return chosen[-1]


def ranking(records: Sequence[Record], by: str = "lswag") -> None:
    """Prints records, ranked by a proxy, as a table on stdout."""
    table = Table(box=None, pad_edge=False)
    other = [] if by == "lswag" else [by]
    for heading in ("rank", *other, "L-SWAG", "Lambda", "Psi", "parameters", "multiply-adds", "saturation"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("arch", overflow="fold")
    for rank, r in enumerate(records, start=1):
        counts, saturation = r.counts, r.pattern_saturation
        if counts is None or saturation is None:
            continue
        table.add_row(
            *(
                str(rank),
                *(f"{r.proxies[name]:.6g}" for name in other),
                f"{r.lswag:.6g}",
                f"{r.trainability:.6g}",
                str(r.expressivity),
            ),
            *(f"{counts.parameters / 1e6:.2f} M", f"{counts.multiply_adds / 1e9:.3f} G"),
            *(f"{saturation.ratio:.3f}", short_arch(r.arch)),
        )
    console().print(table)


def short_arch(arch: Mapping[str, Any]) -> str:
    """Returns an arch on one short line: a list of digits without commas, n equal entries of another one as entry*n."""
    return " ".join(f"{name}={_short(value)}" for name, value in arch.items())


def show_spaces(*, as_json: bool) -> None:
    """Prints every search space with its size and the range of its candidates."""
    from .. import spaces

    rows = [_described(spaces.get(name)) for name in spaces.names()]
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("space", "candidates", "parameters", "multiply-adds", "options"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        low, high = row["parameters"]
        least, most = row["multiply_adds"]
        options = short_arch(row["options"])
        parameters, macs = f"{low / 1e6:.1f} to {high / 1e6:.1f} M", f"{least / 1e9:.2f} to {most / 1e9:.2f} G"
        count = row["candidates"]
        table.add_row(row["name"], f"{count:.3g}" if count >= 1e6 else f"{count:,}", parameters, macs, options)
    console().print(table)


def show_proxies(*, as_json: bool) -> None:
    """Prints every proxy with its source, whether it takes gradients, and which of its values is best."""
    from ..proxies import get, names

    found = [get(name) for name in names()]
    if as_json:
        for proxy in found:
            fields = ("name", "gradient_based", "lower_is_better", "source")
            print(json.dumps({field: getattr(proxy, field) for field in fields}))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("proxy", "gradients", "best", "source"):
        table.add_column(heading, overflow="fold")
    for proxy in found:
        best = "lowest" if proxy.lower_is_better else "highest"
        table.add_row(proxy.name, "yes" if proxy.gradient_based else "no", best, proxy.source)
    console().print(table)


def show_checks(*, as_json: bool) -> int:
    """Prints what works here; returns 1 where nothing can be scored at all, else 0."""
    from ..doctor import checks

    found = checks()
    for check in found:
        if as_json:
            print(json.dumps(check.__dict__))
        else:
            print(f"{'ok' if check.ok else '--':3} {check.name:<12} {check.detail}")
    return 0 if any(check.ok for check in found if check.kind == "backend") else 1


def _by_context(store: Store) -> dict[str, Run]:
    """The last run of each context that has recorded something, oldest first."""
    return {run.context: run for run in store.runs() if run.candidates}


def _described(space: Any) -> dict[str, Any]:
    sampled = list(space.sample(200, seed=0))
    counts = {"parameters": [space.params(a) for a in sampled], "multiply_adds": [space.macs(a) for a in sampled]}
    ranges = {name: (min(values), max(values)) for name, values in counts.items()}
    options = {name: value for name, value in space.options.items() if name != "name"}
    return {"name": space.name, "candidates": space.size, **ranges, "options": options}


def _settings(run: Run) -> str:
    kept = {name: run.metadata.get("options", {}).get(name) for name in ("dtype", "groups", "window", "seed")}
    space = run.metadata.get("space", {}).get("name")
    images = run.metadata.get("notes", {}).get("images", "")
    others = f"proxies={','.join(_proxies(run))}" if _proxies(run) != ["lswag"] else ""
    shown = (space, f"S = {run.metadata.get('samples')}", short_arch(kept), others, images)
    return "  ".join((run.context[:8], *(str(text) for text in shown if text)))


def _proxies(run: Run) -> list[str]:
    """The names of the proxies of a run."""
    return [proxy["name"] for proxy in run.metadata.get("options", {}).get("proxies", [LSWAG])]


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        if all(isinstance(entry, int) and 0 <= entry <= 9 for entry in value):
            return "".join(map(str, value))
        runs = ((entry, len(list(equal))) for entry, equal in groupby(value))
        return ",".join(f"{entry:g}*{n}" if n > 1 else f"{entry:g}" for entry, n in runs)
    return str(value)


def console() -> Console:
    """Returns the console of a command: as wide as the terminal, and wide enough for a table where it is piped."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH_IN_A_PIPE)
