from __future__ import annotations

import os
from pathlib import Path

import pytest

from lswag_fast.cli.files import write_files
from lswag_fast.errors import InputError


def test_files_are_written_whole_and_written_over(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    write_files(folder, {"a": b"1", "b": b"2"})
    write_files(folder, {"a": b"3"})
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == {"a": b"3", "b": b"2"}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot write into .*file.*choose another --output"):
        write_files(tmp_path / "file", {"a": b"1"})
