"""The score store: an SQLite file that loses no record, records none twice, and is shared by processes.

A record is durable once :meth:`Store.commit` returns (write-ahead log, `synchronous = FULL`). A candidate is claimed
while it is being scored, so that two processes on one store share the work; a claim whose owner has died is taken
over. Keys are unique, so even a candidate that two processes have scored is recorded once.

The file must be on a local file system: SQLite's write-ahead log needs shared memory and reliable locks.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sqlite3
import threading
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import StoreError
from .records import COLUMNS, Record, Row, decode

SCHEMA_VERSION = 2
REMOTE_CLAIM_SECONDS = 300.0
"""After this long without a sign of life, a claim made on another machine (or in another container) is taken over."""

_APPLICATION_ID = 0x4C535747
_BUSY_SECONDS = 60.0
_NETWORK_FILE_SYSTEMS = frozenset(
    ("9p", "afs", "beegfs", "ceph", "cifs", "fuse.sshfs", "fuse.glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3")
)
_SCHEMA = f"""
CREATE TABLE runs (id INTEGER PRIMARY KEY, context TEXT NOT NULL, started REAL NOT NULL, metadata TEXT NOT NULL);
CREATE TABLE records (
    key TEXT PRIMARY KEY, run INTEGER NOT NULL REFERENCES runs (id), status TEXT NOT NULL, error TEXT,
    arch TEXT NOT NULL, lswag REAL, trainability REAL, expressivity INTEGER, saturation REAL, saturation_bound TEXT,
    parameters INTEGER, multiply_adds INTEGER, sum_log_numel REAL, positions INTEGER, seconds REAL NOT NULL,
    recorded REAL NOT NULL, warnings TEXT NOT NULL, uncovered TEXT NOT NULL, patterns_by_activation TEXT,
    proxies TEXT NOT NULL DEFAULT '{{}}', proxy_seconds TEXT NOT NULL DEFAULT '{{}}', layers TEXT NOT NULL);
CREATE INDEX records_by_run ON records (run, status);
CREATE INDEX records_by_score ON records (lswag) WHERE status = 'ok';
CREATE TABLE claims (
    key TEXT PRIMARY KEY, owner TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, born INTEGER NOT NULL,
    heartbeat REAL NOT NULL) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
_FROM_VERSION_1 = f"""
ALTER TABLE records ADD COLUMN proxies TEXT NOT NULL DEFAULT '{{}}';
ALTER TABLE records ADD COLUMN proxy_seconds TEXT NOT NULL DEFAULT '{{}}';
PRAGMA user_version = {SCHEMA_VERSION};
"""
_COLUMNS_OF_VERSION_1 = COLUMNS.replace("proxies, proxy_seconds", "'{}', '{}'")
_INFINITIES = "WHEN 'Infinity' THEN 9e999 WHEN '-Infinity' THEN -9e999"  # SQLite's JSON holds them as text
_ADVICE = {
    "full": "free some disk space, or move the file to a larger disk, and run again; everything recorded is kept",
    "readonly": "the file or its folder is read-only; make both writable, or pass another path",
    "unable to open": "its folder must exist, and you must be allowed to write there; make it, or pass another path",
    "locked": "another program has kept it locked for a minute; close that program and run again",
    "not a database": "the file is not a score store; pass another path",
    "malformed": "the file is damaged; export what can be read, or restore a copy",
    "disk I/O": "the disk refused (a quota, a file size limit, a fault); make room or use another disk, and run again",
}
_owners_here: set[str] = set()


@dataclass(frozen=True)
class Run:
    """One set of settings that recorded into a store; records of equal `context` are comparable."""

    id: int
    context: str  # the hash of everything a score depends on, except the candidate
    started: float
    metadata: dict[str, Any]
    candidates: int
    failed: int


class Store:
    """A score store in the file `path`; None keeps it in a temporary file that vanishes with the object.

    Raises StoreError where the file cannot be opened, read or written, or is no store of this version or an older one.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, read_only: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.RLock()
        self._columns = COLUMNS
        with self._explained("opened"):
            self._connection = self._connect(read_only)
            try:
                self._prepare(read_only)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Closes the file; what was committed stays."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_run(self, context: str, metadata: dict[str, Any]) -> int:
        """Returns the id of the run with these settings and metadata, new where there is none."""
        text = json.dumps(metadata, sort_keys=True)
        with self._writing(durable=True) as execute:
            known = execute("SELECT id FROM runs WHERE context = ? AND metadata = ?", (context, text)).fetchone()
            if known:
                return int(known[0])
            row = "INSERT INTO runs (context, started, metadata) VALUES (?, ?, ?) RETURNING id"
            return int(execute(row, (context, time.time(), text)).fetchone()[0])

    def find(self, keys: Iterable[str]) -> dict[str, Record]:
        """Returns the records of those of `keys` that have one."""
        wanted = json.dumps(list(keys))
        query = f"SELECT {self._columns} FROM records WHERE key IN (SELECT value FROM json_each(?))"
        with self._reading() as execute:
            return {row[0]: decode(row, reused=True) for row in execute(query, (wanted,)).fetchall()}

    @contextlib.contextmanager
    def owner(self) -> Iterator[str]:
        """Gives the token under which candidates are claimed; its claims die with the context and the process."""
        token = uuid.uuid4().hex
        _owners_here.add(token)
        try:
            yield token
        finally:
            _owners_here.discard(token)

    def claim(self, owner: str, keys: Sequence[str], limit: int, retry_before: float | None = None) -> set[str]:
        """Claims up to `limit` candidates for `owner`; returns those of `keys` that it may score now.

        Left out are those that are recorded (a failed one counts as recorded, unless that was before `retry_before`,
        in seconds since 1970) and those that a living owner claims.
        """
        wanted = json.dumps(list(keys))
        chosen = "(SELECT value FROM json_each(?))"
        taken = f"SELECT key FROM records WHERE key IN {chosen} AND NOT (status = 'error' AND recorded < ?)"
        held = f"SELECT key, owner, host, pid, born, heartbeat FROM claims WHERE key IN {chosen}"
        now = time.time()
        # A claim needs no fsync: when the machine dies, so does its owner.
        with self._writing(durable=False) as execute:
            recorded = {row[0] for row in execute(taken, (wanted, retry_before or 0.0)).fetchall()}
            alive = {key for key, *claimant in execute(held, (wanted,)).fetchall() if _alive(claimant, now)}
            free = [key for key in dict.fromkeys(keys) if key not in recorded and key not in alive][:limit]
            mine = (owner, _host(), os.getpid(), _born(os.getpid()), now)
            for key in free:
                execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?, ?)", (key, *mine))
        return set(free)

    def commit(self, owner: str, rows: Sequence[Row]) -> list[Record]:
        """Records what `owner` has finished, releases all its claims, and returns the records as they are stored.

        A candidate that another process has recorded meanwhile keeps that record, which is returned as reused.
        """
        upsert = (
            f"INSERT INTO records ({COLUMNS}) VALUES ({', '.join('?' * len(COLUMNS.split(',')))}) ON CONFLICT (key) DO "
            f"UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in COLUMNS.split(', '))} WHERE status = 'error'"
        )
        with self._writing(durable=True) as execute:
            now = time.time()
            stamped = [row.committed(now) for row in rows]
            ours = {row.record.key: row.record for row in stamped if execute(upsert, row.values).rowcount == 1}
            execute("DELETE FROM claims WHERE owner = ?", (owner,))
        keys = [row.record.key for row in rows]
        theirs = self.find([key for key in keys if key not in ours])
        return [ours.get(key) or theirs[key] for key in keys]

    def runs(self) -> list[Run]:
        """Returns the runs that recorded something or began to, oldest first."""
        query = (
            "SELECT id, context, started, metadata, count(status), total(status = 'error') FROM runs "
            "LEFT JOIN records ON records.run = runs.id GROUP BY runs.id ORDER BY runs.id"
        )
        with self._reading() as execute:
            rows = execute(query).fetchall()
        return [Run(run, context, at, json.loads(text), n, int(bad)) for run, context, at, text, n, bad in rows]

    def records(self, *, layers: bool = True) -> Iterator[Record]:
        """Yields every record in the order of recording, in flat memory; without `layers` much faster."""
        query = f"SELECT {self._columns if layers else self._light_columns} FROM records ORDER BY rowid"
        with self._reading() as execute:
            for row in execute(query):
                yield decode(row, reused=True)

    def top(self, n: int, context: str, *, by: str = "lswag", lowest: bool = False) -> list[Record]:
        """Returns the `n` highest (or `lowest`) with these settings, best first, without their layers.

        Best by L-SWAG, or by the proxy that `by` names; candidates without its value are left out.
        """
        # The plus keeps SQLite from sorting all records of the runs instead of walking the index by score.
        proxies = "proxies" if self._columns == COLUMNS else "'{}'"
        value = "lswag" if by == "lswag" else f"json_extract({proxies}, :path)"
        order = value if by == "lswag" else f"CASE {value} {_INFINITIES} ELSE {value} END"
        query = (
            f"SELECT {self._light_columns} FROM records WHERE status = 'ok' AND +run IN (SELECT id FROM runs WHERE "
            f"context = :context) AND {value} IS NOT NULL ORDER BY {order} {'ASC' if lowest else 'DESC'}, key LIMIT :n"
        )
        given = {"context": context, "path": f'$."{by}"', "n": n}
        with self._reading() as execute:
            return [decode(row, reused=True) for row in execute(query, given).fetchall()]

    @property
    def _light_columns(self) -> str:
        return self._columns.removesuffix(", layers")

    def _connect(self, read_only: bool) -> sqlite3.Connection:
        if self.path is None:
            return _open("")  # SQLite's own temporary file: it spills to the disk and is gone when closed
        if self.path.is_dir():
            raise StoreError(f"store {self.path} is a folder; pass a file, such as {self.path / 'scores.db'}")
        if not read_only:
            _warn_of_network(self.path)
            return _open(self.path)
        if not self.path.exists():
            raise StoreError(f"there is no store {self.path}; score some candidates into it first")
        if _may_write(self.path) and _may_write(self.path.parent):
            return _open(self._uri("mode=rw"), uri=True)
        # A write-ahead log needs a shared-memory file beside it, which cannot be made in a read-only folder.
        wal = Path(f"{self.path}-wal")
        at_rest = not wal.exists() or wal.stat().st_size == 0
        return _open(self._uri("mode=ro&immutable=1" if at_rest else "mode=ro"), uri=True)

    def _uri(self, query: str) -> str:
        return f"{Path.absolute(self.path).as_uri()}?{query}" if self.path else ""

    def _prepare(self, read_only: bool) -> None:
        execute = self._connection.execute
        version = execute("PRAGMA user_version").fetchone()[0]
        application = execute("PRAGMA application_id").fetchone()[0]
        tables = execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version > SCHEMA_VERSION and application == _APPLICATION_ID:
            raise StoreError(
                f"store {self.path} has schema version {version}, written by a newer lswag_fast; this one reads up to "
                f"version {SCHEMA_VERSION}: upgrade lswag_fast, or use another file"
            )
        if application != _APPLICATION_ID and (tables or read_only):
            raise StoreError(f"{self.path} is an SQLite file, but no score store; use another file")
        if read_only:
            if version == 1:
                self._columns = _COLUMNS_OF_VERSION_1
            execute("PRAGMA query_only = ON")
            return
        execute("PRAGMA journal_mode = WAL")
        with self._writing(durable=True) as write:
            # Looked up again under the lock: another process may just have laid the schema.
            version = write("PRAGMA user_version").fetchone()[0]
            script = {0: _SCHEMA, 1: _FROM_VERSION_1}.get(version, "")
            for statement in filter(str.strip, script.split(";")):
                write(statement)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        with self._explained("read"):
            yield self._connection.execute

    @contextlib.contextmanager
    def _writing(self, *, durable: bool) -> Iterator[Any]:
        with self._lock, self._explained("written"):
            execute = self._connection.execute
            execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            execute("BEGIN IMMEDIATE")
            try:
                yield execute
                execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns SQLite's errors into StoreErrors that say what to do."""
        try:
            yield
        except sqlite3.Error as error:
            name = "the temporary store" if self.path is None else f"store {self.path}"
            advice = next((text for part, text in _ADVICE.items() if part in str(error)), "check the file and its disk")
            raise StoreError(f"{name} cannot be {what} ({error}): {advice}") from error


def network_file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Returns the type of the network file system that holds `path`, None on a local or unknown one."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    target = Path(os.path.realpath(path))
    holders = [(len(point), kind) for _, point, kind, *_ in lines if target.is_relative_to(point)]
    kind = max(holders, default=(0, ""))[1]
    return kind if kind in _NETWORK_FILE_SYSTEMS else None


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _warn_of_network(path: Path) -> None:
    kind = network_file_system(path)
    if kind:
        warnings.warn(
            f"store {path} is on a network file system ({kind}), where SQLite's locks and write-ahead log are not "
            f"reliable: use it from one machine only, or better a file on a local disk",
            stacklevel=4,
        )


def _open(path: str | Path, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(
        path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=uri, cached_statements=32
    )


def _alive(claimant: Sequence[Any], now: float) -> bool:
    owner, host, pid, born, heartbeat = claimant
    if host != _host():
        return bool(now - heartbeat < REMOTE_CLAIM_SECONDS)
    if pid == os.getpid() and born == _born(pid):
        return owner in _owners_here
    # A process id is given out again; with its time of birth it is unique.
    return _running(pid) and born == _born(pid)


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _born(pid: int) -> int:
    """The start of a process in clock ticks since boot, 0 where the system does not tell, -1 for a zombie."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return -1 if after_name[0] in "ZX" else int(after_name[19])


def _host() -> str:
    """This machine, this boot and this process namespace: where process ids mean the same."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
