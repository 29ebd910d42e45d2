"""Reads score stores for a study: scores that differ only in what a seed draws are repeats of each other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..correlation import Floats
from ..ensembles.aggregation import az_nas, te_nas
from ..errors import InputError
from ..options import LSWAG
from ..records import Record
from ..store import Run, Store
from .joining import COUNTS, Scores
from .tables import Arch

_DRAWN = r", seed \d+$"
"""How the note about images ends where the seed has drawn them."""
COUNT_NAMES = ("parameters", "multiply_adds", "sum_log_numel", "positions")
"""The counts of a record."""
_COUNT_OF = {"params": "parameters", "flops": "multiply_adds"}
"""Proxies that are counts of the record under another name."""

_BY_RANKS: dict[str, tuple[tuple[str, ...], Callable[..., Floats]]] = {
    "te_nas_by_ranks": (("te_nas_regions", "te_nas_ntk"), te_nas),
    "az_nas_by_ranks": (
        ("az_nas_expressivity", "az_nas_progressivity", "az_nas_trainability", "az_nas_complexity"),
        az_nas,
    ),
}
"""Ensembles of L-SWAG's table 1 that a store with all their parts is studied by, too."""


def is_store(path: Path) -> bool:
    """Returns whether a file is an SQLite database."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def read(paths: Sequence[Path], context: str = "", seeds: Sequence[int] = ()) -> Scores:
    """Returns the scores of stores, a repeat for each seed, that share their settings.

    Args:
        paths: the stores; equal settings are brought together.
        context: the first characters of the id of the settings, as `lswag-fast top` lists them; the newest by default.
        seeds: take the repeats of these seeds alone; all by default, but those with less than half the architectures
            that the fullest has.

    Raises:
        InputError: no scores, none with these settings, or a seed that stands for two batches.
        StoreError: a store cannot be read.
    """
    from .. import spaces  # late, for it imports torch, which a study of published tables does without

    runs = [(path, run) for path in paths for run in _runs(path) if run.candidates]
    if not runs:
        raise InputError(f"{', '.join(map(str, paths))} holds no scores; score some candidates into it first")
    chosen = [(path, run) for path, run in runs if run.context.startswith(context)]
    if not chosen:
        raise InputError(f"no settings have an id that begins with {context!r}; `lswag-fast top` lists the ids")
    newest = max((run for _, run in chosen), key=lambda run: run.started)
    if context and len({_settings(run) for _, run in chosen}) > 1:
        raise InputError(f"several settings have an id that begins with {context!r}; give more characters of it")
    wanted = [(path, run) for path, run in runs if _settings(run) == _settings(newest)]
    if seeds:
        wanted = [(path, run) for path, run in wanted if run.metadata["options"]["seed"] in seeds]
    space: Any = spaces.get(**newest.metadata["space"])
    notes = []
    others = {run.context for _, run in runs if _settings(run) != _settings(newest)}
    if others:
        ids = ", ".join(sorted(other[:8] for other in others))
        notes.append(f"the newest settings, {newest.context[:8]}, are studied; others need --context ({ids})")
    return _scores(space, wanted, notes, all_seeds=not seeds)


def _runs(path: Path) -> list[Run]:
    with Store(path, read_only=True) as store:
        return store.runs()


def _settings(run: Run) -> str:
    """What two repeats have in common: all that a score depends on, except what the seed draws."""
    given = run.metadata
    kept = {name: given[name] for name in ("space", "loss", "definition_version", "samples")}
    options = {"proxies": [LSWAG]} | given["options"]
    kept["options"] = {name: value for name, value in options.items() if name != "seed"}
    kept["weights"] = re.sub(r"^seed:.*", "seed", given["weights"])
    source = str(given.get("notes", {}).get("images", ""))
    kept["source"] = re.sub(_DRAWN, "", source)
    if not re.search(_DRAWN, source):
        kept |= {"images": given["images"], "labels": re.sub(r"^seed:.*", "seed", given["labels"])}
    return json.dumps(kept, sort_keys=True)


def _check_seeds(runs: Sequence[tuple[Path, Run]]) -> None:
    """Raises InputError where one seed stands for two batches, which are no repeats of each other."""
    known: dict[int, Run] = {}
    for _, run in runs:
        seed = run.metadata["options"]["seed"]
        first = known.setdefault(seed, run)
        if any(run.metadata[name] != first.metadata[name] for name in ("images", "labels")):
            raise InputError(
                f"the settings {first.context[:8]} and {run.context[:8]} have seed {seed} alike, but other images or "
                f"labels, so they are no repeats of each other; keep one of them in a store of its own"
            )


def _scores(space: Any, runs: Sequence[tuple[Path, Run]], notes: list[str], *, all_seeds: bool) -> Scores:
    _check_seeds(runs)
    by_seed: dict[int, dict[str, Record]] = {}
    failed = 0
    for path in dict.fromkeys(path for path, _ in runs):
        ids = {run.id: run.metadata["options"]["seed"] for where, run in runs if where == path}
        with Store(path, read_only=True) as store:
            for record in store.records(layers=False):
                if record.run in ids and record.status == "ok":
                    by_seed.setdefault(ids[record.run], {})[space.encode(record.arch)] = record
                failed += record.run in ids and record.status == "error"
    fullest = max(map(len, by_seed.values()), default=0)
    repeats = {seed: found for seed, found in by_seed.items() if not all_seeds or len(found) >= fullest / 2}
    if failed:
        notes.append(f"{failed} scores failed and are left out")
    if len(repeats) < len(by_seed):
        sparse = ", ".join(f"{seed} ({len(found)})" for seed, found in by_seed.items() if seed not in repeats)
        notes.append(f"seeds with less than half of the architectures are left out: {sparse}")
    if len(repeats) > 1:
        notes.append(f"{len(repeats)} repeats, seeds {', '.join(map(str, repeats))}")
    keys = list(dict.fromkeys(key for found in repeats.values() for key in found))
    name = ", ".join(dict.fromkeys(path.stem for path, _ in runs))
    columns = _columns(keys, list(repeats.values()))
    columns |= _ensembles(columns)
    for turned in _lowest_first(runs[0][1], columns):
        columns[turned] = -columns[turned]
        notes.append(f"{turned} is best at its lowest by its definition, and is studied with its sign turned")
    return Scores(name, keys, columns, key_in(space), notes)


def _ensembles(columns: Mapping[str, Floats]) -> dict[str, Floats]:
    """TE-NAS and AZ-NAS as their papers combine their parts: by ranks among all architectures of a repeat."""
    found = {}
    for name, (parts, combine) in _BY_RANKS.items():
        if not all(part in columns for part in parts):
            continue
        given = np.stack([columns[part] for part in parts])  # [parts, R, N]
        combined = np.stack([combine(*given[:, repeat]) for repeat in range(given.shape[1])])
        found[name] = np.where(np.isnan(given).any(axis=0), np.nan, combined)
    return found


def _lowest_first(run: Run, columns: Mapping[str, Floats]) -> list[str]:
    """The proxies of which a lower value is better."""
    from ..proxies.registry import lowest_is_best

    described = run.metadata["options"].get("proxies", [LSWAG])
    return [proxy["name"] for proxy in described if proxy["name"] in columns and lowest_is_best(proxy)]


def _columns(keys: Sequence[str], repeats: Sequence[dict[str, Record]]) -> dict[str, Floats]:
    columns: dict[str, Floats] = {}
    for repeat, found in enumerate(repeats):
        for place, key in enumerate(keys):
            for name, value in _values(found[key]).items() if key in found else ():
                if name not in columns:
                    columns[name] = np.full((len(repeats), len(keys)), np.nan)
                columns[name][repeat, place] = np.nan if value is None else value
    # A count depends on no seed: any repeat that holds the architecture tells it.
    columns = {n: np.nanmax(v, axis=0, keepdims=True) if n in COUNTS else v for n, v in columns.items()}
    twice = {n for n, count in _COUNT_OF.items() if n in columns and np.array_equal(columns[n], columns[count])}
    return {name: values for name, values in columns.items() if name not in twice}


def _values(record: Record) -> dict[str, float | None]:
    found = {"lswag": record.lswag, "lambda": record.trainability, "psi": record.expressivity}
    found |= {name: value for name, value in record.proxies.items() if name not in found}
    return found | {name: getattr(record.counts, name) for name in COUNT_NAMES}


def key_in(space: Any) -> Callable[[Arch], str]:
    """Returns what tells the architectures of a space apart: one text for every spelling of the same."""

    def key(arch: Arch) -> str:
        return str(space.encode(space.decode(arch) if isinstance(arch, str) else arch))

    return key
