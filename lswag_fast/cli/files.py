"""Files that a command leaves in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes `files`, by name, into `folder`, which is made where there is none; each file is whole or not there.

    Raises InputError where the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            partial = folder / f".{name}.{os.getpid()}.partial"
            partial.write_bytes(data)
            os.replace(partial, folder / name)
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error}); choose another --output") from error
