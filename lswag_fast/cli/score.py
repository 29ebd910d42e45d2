"""`lswag-fast score`: candidates from a seed or a file, a progress display, and the ranking at the end."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .. import images, spaces
from ..engine.scorer import Scorer
from ..errors import InputError
from ..records import Record
from .progress import Progress
from .tables import ranking

_DEFAULT_COUNT = 32
_SHOWN = 5
_LONGEST = 240


@dataclass(frozen=True)
class Request:
    """What one `score` command asks for."""

    space: str
    space_options: dict[str, int]
    count: int | None
    seed: int
    archs: Path | None
    images: str
    samples: int
    store: Path
    options: dict[str, Any]
    top: int
    as_json: bool
    retry_failed: bool
    threads: int | None


@dataclass
class ArchFile:
    """Candidates of a file with one a line, as the space decodes it; lines that hold none are told and counted."""

    path: Path
    space: Any
    tell: Any
    bad_lines: int = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield self.space.decode(line.decode())
                except (InputError, UnicodeDecodeError) as error:
                    self.bad_lines += 1
                    if self.bad_lines <= _SHOWN:
                        self.tell(f"{self.path}, line {number}: {error}")

    def count(self) -> int:
        """Returns the number of lines that are not blank."""
        with self.path.open("rb") as lines:
            return sum(bool(line.strip()) for line in lines)


@dataclass
class _Summary:
    """What is said once at the end instead of once a candidate."""

    done: int = 0
    errors: list[str] = field(default_factory=list)
    warnings: dict[str, tuple[str, int]] = field(default_factory=dict)  # by kind: one of them, and how many

    def add(self, record: Record) -> None:
        self.done += 1
        if record.error and len(self.errors) < _SHOWN:
            self.errors.append(f"{json.dumps(record.arch)}: {record.error}")
        for text in record.warnings:
            # Warnings of a kind differ in their numbers, and in the layers that they name after a colon.
            kind = re.sub(r"\d+(\.\d+)?", "#", text.split(": ")[0])
            if kind in self.warnings or len(self.warnings) < _SHOWN:
                first, n = self.warnings.get(kind, (textwrap.shorten(text, _LONGEST, placeholder=" ..."), 0))
                self.warnings[kind] = first, n + 1


def run(request: Request) -> int:
    """Scores what `request` asks for; returns the exit code."""
    if request.threads:
        torch.set_num_threads(request.threads)
    if request.archs and not request.archs.is_file():
        raise InputError(f"there is no arch file {request.archs}")
    space = spaces.get(request.space, **request.space_options)
    batch = images.load(
        request.images,
        request.samples,
        image_size=space.options["image_size"],
        seed=request.seed,
        num_classes=space.options["num_classes"],
    )
    scorer = Scorer(
        space,
        batch.images,
        batch.labels,
        store=request.store,
        retry_failed=request.retry_failed,
        notes={"images": batch.description},
        seed=request.seed,
        **request.options,
    )
    with scorer, Progress(_total(request, space)) as progress:
        file = ArchFile(request.archs, space, progress.tell) if request.archs else None
        archs = islice(file, request.count) if file else space.sample(request.count or _DEFAULT_COUNT, request.seed)
        summary = _Summary()
        try:
            for record in scorer.score(archs):
                summary.add(record)
                progress.advance(reused=record.reused)
                if request.as_json:
                    print(json.dumps(record.to_dict(layers=False)), flush=True)
        except KeyboardInterrupt:
            progress.tell(f"interrupted; everything finished is in {request.store}, run again to go on")
            return 130
        progress.stop()
        bad_lines = file.bad_lines if file else 0
        _report(request, scorer, summary, bad_lines)
    return 1 if scorer.failures or bad_lines else 0


def _total(request: Request, space: Any) -> int:
    if request.archs is None:
        return request.count or _DEFAULT_COUNT
    lines = ArchFile(request.archs, space, None).count()
    return min(lines, request.count or lines)


def _report(request: Request, scorer: Scorer, summary: _Summary, bad_lines: int) -> None:
    out = sys.stderr if request.as_json else sys.stdout
    if not request.as_json and request.top:
        ranking(scorer.store.top(request.top, scorer.context.id))
    for text, n in summary.warnings.values():
        print(f"Warning ({n} of {summary.done} candidates): {text}", file=out)
    for text in summary.errors:
        print(f"Failed: {text}", file=out)
    if bad_lines:
        print(f"{bad_lines} lines of {request.archs} could not be read.", file=out)
    options = scorer.options
    print(
        f"{summary.done} candidates: {scorer.scored} scored, {scorer.reused} found done, {scorer.failures} failed "
        f"({options.device}, {options.dtype}, S = {request.samples}, G = {options.groups}); store {request.store}",
        file=out,
    )
