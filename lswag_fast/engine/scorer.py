"""The Scorer: streams candidates of one search space through `score`, into a store that keeps what was finished."""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import scoring
from ..backends import resolve_device
from ..errors import InputError, StoreError, is_out_of_memory
from ..losses import class_labels
from ..options import ScoreOptions
from ..proxies.result import LswagResult
from ..records import Record, Row
from ..store import Store
from .autoformer import PendingScore, engine_for
from .identity import Context, describe_loss

COMMIT_SECONDS = 0.5
"""A batch of finished records is committed about this often: a kill costs that much, and the running candidate."""

_LONGEST_BATCH = 256
_WINDOW = 1024
_POLL_SECONDS = 0.1
_ERROR_CHARACTERS = 2000

Arch = Mapping[str, Any]
Loss = Callable[[Any, Any], Tensor]


class Space(Protocol):
    """What a search space must offer; one that has a `supernet` too is scored by views of a single supernet."""

    name: str
    coupled: bool

    @property
    def options(self) -> Mapping[str, Any]:
        """What the space was made with, its name included."""

    def canonical(self, arch: Arch) -> dict[str, Any]:
        """Returns the canonical form of a candidate; raises InputError outside the space."""

    def encode(self, arch: Arch) -> str:
        """Returns one text for every spelling of the same candidate."""

    def build(self, arch: Arch, seed: int = 0) -> nn.Module:
        """Returns the candidate with weights drawn from `seed`."""


@dataclass(frozen=True)
class _Candidate:
    key: str
    arch: dict[str, Any]


@dataclass(frozen=True)
class _FailedLaunch:
    """What stands for a score that could not be started, until its turn to be read comes."""

    error: Exception

    def finish(self) -> LswagResult:
        raise self.error


class Scorer:
    """Scores candidates of one space on one batch of images, and keeps every score in a store.

    Args:
        space: the search space, such as `lswag_fast.spaces.get("autoformer-tiny")`.
        images: [S, 3, H, W] floats, finite, normalised; moved to the device of the scores.
        labels: [S] integers; None draws them from the seed.
        store: a path, an open :class:`lswag_fast.store.Store` (left open), or None for a temporary store.
        supernet: the weights; None draws the supernet of `space` from the seed (or each candidate's own weights, where
            the space has no supernet).
        loss: as in :func:`lswag_fast.score`. The store knows a function by its qualified name, so give a changed
            function another name; a text in its `identity` attribute replaces the name.
        retry_failed: score again what the store holds as failed.
        notes: plain values kept in the store beside versions and options, such as where the images come from.
        options: the remaining options of :func:`lswag_fast.score`.

    Raises:
        InputError: images, labels, loss or options cannot be used; raised before anything is scored.
        StoreError: the store cannot be opened and written.

    `scored`, `reused` and `failures` count the records yielded so far: computed here, found in the store, and (among
    both) failed.
    """

    def __init__(
        self,
        space: Space,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        store: Store | str | os.PathLike[str] | None = None,
        supernet: Any | None = None,
        loss: Loss | None = None,
        retry_failed: bool = False,
        notes: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.options = _resolved(space, images, labels, loss, options)
        device = self.options.device
        self.space, self.images, self.loss = space, images.to(device), loss
        self.labels = labels.to(device) if isinstance(labels, Tensor) else labels
        self.retry_failed = retry_failed
        self.scored = self.reused = self.failures = 0
        seed = self.options.seed
        weights = f"seed:{seed}" if supernet is None else f"state:{supernet.digest()}"
        named_loss = describe_loss(loss, lasting=store is not None)
        self.context = Context.of(space.options, images, labels, self.options, weights, named_loss)
        self._supernet = space.supernet(seed) if supernet is None and hasattr(space, "supernet") else supernet
        self._engine = engine_for(self._supernet, images, labels, loss, self.options)
        self._in_flight = 1 if self._engine is None else self._engine.in_flight
        self._owns_store = not isinstance(store, Store)
        self.store = store if isinstance(store, Store) else Store(store)
        self.run = self.store.begin_run(
            self.context.id, {**self.context.metadata(len(images)), "notes": dict(notes or {})}
        )

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the store, unless it was given open."""
        if self._owns_store:
            self.store.close()

    def score(self, archs: Iterable[Arch]) -> Iterator[Record]:
        """Yields one record a candidate of `archs`, each after its commit, in the order they finish.

        `archs` may be an endless stream: it is read at most some hundred candidates ahead, and memory stays flat. On a
        CUDA device a candidate of a supernet is launched before the one in front of it is read, so that their `seconds`
        overlap. A candidate that the store holds already, or that came before in the stream, is yielded with `reused`
        true; one that fails is recorded with its error; those that another process is scoring now are waited for.

        Raises:
            InputError: a candidate is outside the space (its place in the stream is named), or the arguments suit no
                candidate. What finished before is in the store.
            StoreError: the store cannot be written any more.
        """
        stream = self._candidates(archs)
        retry_before = time.time() if self.retry_failed else None
        pending: list[_Candidate] = []
        waiting, batch = 0, 1
        with self.store.owner() as owner:
            while True:
                pending += islice(stream, max(0, min(batch + waiting, _WINDOW) - len(pending)))
                if not pending:
                    return
                found = self._found(pending, retry_before)
                known = [found[c.key] for c in pending if c.key in found]
                pending = [c for c in pending if c.key not in found]
                # No claim is held at a yield, so a caller who stops reading holds nobody up.
                yield from map(self._counted, known)
                started = time.monotonic()
                free = self.store.claim(owner, [c.key for c in pending], batch, retry_before) if pending else set()
                finished = self._finish(owner, {c.key: c for c in pending if c.key in free}) if free else []
                batch = _next_batch(batch, time.monotonic() - started)
                waiting = len(pending) - len(free)
                pending = _without(pending, finished)
                yield from map(self._counted, finished)
                if not known and not finished:
                    time.sleep(_POLL_SECONDS)

    def _candidates(self, archs: Iterable[Arch]) -> Iterator[_Candidate]:
        for place, arch in enumerate(archs, start=1):
            try:
                yield _Candidate(self.context.key(self.space.encode(arch)), self.space.canonical(arch))
            except InputError as error:
                raise InputError(f"candidate {place} of the stream: {error}") from error

    def _found(self, pending: Sequence[_Candidate], retry_before: float | None) -> dict[str, Record]:
        found = self.store.find({c.key for c in pending})
        if retry_before is None:
            return found
        return {key: r for key, r in found.items() if r.status == "ok" or r.recorded >= retry_before}

    def _finish(self, owner: str, claimed: Mapping[str, _Candidate]) -> list[Record]:
        """Scores claimed candidates until a commit is due, and returns the records committed."""
        rows: list[Row] = []  # each made while the device is at the candidates behind it
        under_way: deque[tuple[_Candidate, PendingScore | _FailedLaunch]] = deque()
        due = time.monotonic() + COMMIT_SECONDS
        try:
            for candidate in claimed.values():
                pending = self._launched(candidate)
                if pending is not None:
                    under_way.append((candidate, pending))
                while under_way and (pending is None or len(under_way) == self._in_flight):
                    rows.append(self._read(*under_way.popleft()))
                if pending is None:
                    rows.append(self._row(candidate, partial(self._scored, candidate.arch)))
                if time.monotonic() >= due:
                    break
            while under_way:
                rows.append(self._read(*under_way.popleft()))
        finally:  # an interrupt keeps what was finished
            committed = self.store.commit(owner, rows)
        return committed

    def _launched(self, candidate: _Candidate) -> PendingScore | _FailedLaunch | None:
        """Starts a score beside others; None: it must be scored alone, for want of an engine or of memory."""
        if self._engine is None or self._in_flight == 1:
            return None
        try:
            return self._engine.launch(candidate.arch)
        except Exception as error:
            return None if is_out_of_memory(error) else _FailedLaunch(error)

    def _read(self, candidate: _Candidate, pending: PendingScore | _FailedLaunch) -> Row:
        def finish() -> LswagResult:
            try:
                return pending.finish()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            return self._scored(candidate.arch)

        return self._row(candidate, finish)

    def _row(self, candidate: _Candidate, score: Callable[[], LswagResult]) -> Row:
        return Row.of(self._record(candidate, score), self.run)

    def _record(self, candidate: _Candidate, score: Callable[[], LswagResult]) -> Record:
        started = time.monotonic()
        try:
            return Record.of(candidate.key, candidate.arch, score())
        except (InputError, StoreError):
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
        gc.collect()  # what the failed candidate still holds may be what the next one lacks
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Record(candidate.key, candidate.arch, "error", text, seconds=time.monotonic() - started)

    def _scored(self, arch: Arch) -> LswagResult:
        if self._engine is not None:
            return self._engine.score(arch)
        seed = self.options.seed
        model = self.space.build(arch, seed) if self._supernet is None else self._supernet.subnet(arch)
        model = model.to(self.options.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # every warning is in the record, once a candidate
            return scoring.score(model, self.images, self.labels, loss=self.loss, **vars(self.options))

    def _counted(self, record: Record) -> Record:
        self.scored += not record.reused
        self.reused += record.reused
        self.failures += record.status == "error"
        return record


def _next_batch(batch: int, seconds: float) -> int:
    """Claims for about one commit at a time: more of quick candidates, fewer of slow ones."""
    if seconds > COMMIT_SECONDS:
        return max(1, batch // 2)
    return min(_LONGEST_BATCH, 2 * batch) if seconds < COMMIT_SECONDS / 2 else batch


def _without(pending: Sequence[_Candidate], finished: Sequence[Record]) -> list[_Candidate]:
    """Drops one candidate for each finished record; repeated ones stay, and are found in the store next."""
    done = {record.key for record in finished}
    kept: list[_Candidate] = []
    for candidate in pending:
        if candidate.key in done:
            done.remove(candidate.key)
        else:
            kept.append(candidate)
    return kept


def _resolved(
    space: Space, images: Tensor, labels: Tensor | None, loss: Loss | None, options: Mapping[str, Any]
) -> ScoreOptions:
    accepted = [f.name for f in fields(ScoreOptions)]
    unknown = sorted(options.keys() - set(accepted))
    if unknown:
        raise InputError(f"no option is called {', '.join(unknown)}; there are {', '.join(accepted)}")
    asked = ScoreOptions(**options)
    device = resolve_device(asked.device)
    scoring.check_images(images, device if getattr(images, "is_cuda", False) else "cpu")
    _check_labels(labels, len(images), loss, space.options.get("num_classes"))
    return asked.resolved(len(images), coupled=space.coupled)


def _check_labels(labels: Tensor | None, samples: int, loss: Loss | None, num_classes: int | None) -> None:
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape[:1] != (samples,):
        given = f"{list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"labels must be a tensor with one entry an image, [{samples}, ...], got {given}")
    if loss is None and num_classes is not None:
        class_labels(labels, samples, num_classes, seed=0)
