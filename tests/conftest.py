from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # a machine that only runs the tests of its device may do without
    pass
else:
    settings.register_profile("default", deadline=None)
    # The same examples each time: a change is judged by what it changes.
    settings.register_profile("ci", deadline=None, derandomize=True)
    # Instrumented kernels run some ten times slower; a memory error needs few examples to show.
    settings.register_profile("sanitize", deadline=None, max_examples=8, derandomize=True)
    settings.load_profile(os.environ.get("LSWAG_TEST_PROFILE", "ci" if "CI" in os.environ else "default"))

if not torch.cuda.is_available():
    # Triton chooses when a kernel's module is imported, so for the whole process, before any test is.
    os.environ["TRITON_INTERPRET"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published accuracy tables, which lies beside the repository where there is one."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data tables at {folder}")
    return folder


@pytest.fixture
def most_of_a_device() -> Iterator[Callable[[int], None]]:
    """Takes how many GiB of its memory a test needs, and skips it where fewer are free.

    One test has them at a time and gives them back at its end, for other workers and what compiles share the device.
    """
    with (Path(tempfile.gettempdir()) / "lswag_fast_most_of_a_device.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def take(gib: int) -> None:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] / 2**30
            if free < gib:
                pytest.skip(f"{free:.1f} GiB of device memory are free, and {gib} are needed")

        yield take
        torch.cuda.empty_cache()


_failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.add(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Ends a worker whose CUDA context is broken for good; in another, the tests that are left are run as they are."""
    if nodeid in _failed and "PYTEST_XDIST_WORKER" in os.environ and device_is_broken():
        os._exit(1)


def device_is_broken() -> bool:
    """Tells whether CUDA fails whatever it is asked: after a kernel's bad access it does, until the process ends."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
