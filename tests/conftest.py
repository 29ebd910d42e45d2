from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

settings.register_profile("default", deadline=None)
# The same examples each time: a change is judged by what it changes.
settings.register_profile("ci", deadline=None, derandomize=True)
# Instrumented kernels run some ten times slower; a memory error needs few examples to show.
settings.register_profile("sanitize", deadline=None, max_examples=8, derandomize=True)
settings.load_profile(os.environ.get("LSWAG_TEST_PROFILE", "ci" if "CI" in os.environ else "default"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published accuracy tables, which lies beside the repository where there is one."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data tables at {folder}")
    return folder
