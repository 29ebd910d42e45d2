"""What works on this machine, and what to do about the rest."""

from __future__ import annotations

import os
import platform
import sqlite3
import tempfile
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from . import __version__
from .store import network_file_system

_EXTRAS = {"photos": ("PIL", "sklearn"), "parquet": ("pyarrow",), "lab": ("matplotlib", "scipy", "sklearn")}


@dataclass(frozen=True)
class Check:
    """One thing looked at: whether it works here, and its details or the reason why not."""

    kind: str  # "version", "backend", "threads", "store" or "extra"
    name: str
    ok: bool
    detail: str


def checks() -> list[Check]:
    """Returns every check, those of the computation first."""
    return [*_versions(), *_computation(), *_store(Path.cwd()), *_extras()]


def _versions() -> list[Check]:
    found = [
        Check("version", "lswag_fast", True, __version__),
        Check("version", "python", True, platform.python_version()),
    ]
    for package in ("torch", "numpy", "triton"):
        try:
            found.append(Check("version", package, True, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append(Check("version", package, False, "not installed"))
    return found


def _computation() -> list[Check]:
    try:
        import torch

        from . import _C, backends
    except ImportError as error:
        reason = f"the native extension cannot be loaded ({error}); install lswag_fast again for this Python"
        return [Check("backend", "cpu", False, reason)]
    found = [Check("backend", b.name, b.available, b.detail) for b in backends.backends()]
    device = backends.resolve_device("auto")
    automatic = f"device {device}, dtype {backends.resolve_dtype('auto', device)}"
    return [
        *found,
        Check("version", "automatic", True, automatic),
        Check("version", "build", True, _C.build_info()),
        Check("threads", "threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} logical processors"),
    ]


def _store(folder: Path) -> list[Check]:
    version = sqlite3.sqlite_version
    kind = network_file_system(folder)
    if kind:
        reason = f"this folder is on a network file system ({kind}); keep stores on a local disk"
        return [Check("store", "store", False, reason)]
    try:
        with tempfile.TemporaryDirectory(prefix=".lswag-fast-", dir=folder) as scratch:
            connection = sqlite3.connect(Path(scratch, "probe.db"))
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            connection.close()
    except (OSError, sqlite3.Error) as error:
        return [Check("store", "store", False, f"no store can be made in this folder ({error}); use another one")]
    if mode != "wal":
        return [Check("store", "store", False, "this file system has no write-ahead log; keep stores on a local disk")]
    return [Check("store", "store", True, f"SQLite {version}, write-ahead log works in this folder")]


def _extras() -> list[Check]:
    found = []
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if util.find_spec(name) is None]
        remedy = f"pip install 'lswag-fast[{extra}]' ({', '.join(missing)} not installed)"
        found.append(Check("extra", extra, not missing, remedy if missing else ", ".join(modules)))
    return found
