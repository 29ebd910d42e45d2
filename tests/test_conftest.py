from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist", reason="pytest-xdist is not installed")

CONFTEST = f"""
import importlib.util, os
found = importlib.util.spec_from_file_location("outer", {str(Path(__file__).with_name("conftest.py"))!r})
outer = importlib.util.module_from_spec(found)
found.loader.exec_module(outer)
outer.device_is_broken = lambda: "BROKEN" in os.environ
pytest_runtest_logreport = outer.pytest_runtest_logreport
pytest_runtest_logfinish = outer.pytest_runtest_logfinish
"""
TESTS = """
import os, pytest
@pytest.mark.parametrize("number", range(6))
def test(number):
    assert "BROKEN" not in os.environ
    if number == 1:
        os.environ["BROKEN"] = "yes"
        assert 0
"""


def test_a_broken_device_costs_one_test_its_result(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    run = subprocess.run([*command, "-n", "1", str(tmp_path)], capture_output=True, text=True, env=environment)
    # The test that broke it is told twice: by its own failure, and as that of a worker that ended.
    assert "2 failed, 5 passed" in run.stdout, run.stdout
    assert "worker 'gw0' crashed while running 'test_it.py::test[1]'" in run.stdout
