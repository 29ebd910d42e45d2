from __future__ import annotations

from collections.abc import Callable, Sequence
from io import StringIO

import pytest
import torch
from rich.console import Console
from rich.table import Table

TABLES = pytest.StashKey[list[Table]]()
Show = Callable[[str, Sequence[str], Sequence[Sequence[str]]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure (default: cpu)")
    parser.addoption("--rounds", default=15, type=int, help="rounds of quick methods; a fifth of them of slow ones")
    parser.addoption("--threads", default=2, type=int, help="threads of torch (default: 2)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[TABLES] = []


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """The device to measure on."""
    name: str = pytestconfig.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return name


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    """How often quick methods are timed."""
    return int(pytestconfig.getoption("--rounds"))


@pytest.fixture(autouse=True, scope="session")
def threads(pytestconfig: pytest.Config) -> int:
    """The number of torch's threads, set."""
    torch.set_num_threads(pytestconfig.getoption("--threads"))
    return torch.get_num_threads()


@pytest.fixture
def show(pytestconfig: pytest.Config) -> Show:
    """Prints a table when all is measured: title, column heads, rows."""

    def add(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for place, head in enumerate(heads):
            table.add_column(head, justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        pytestconfig.stash[TABLES].append(table)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    console = Console(file=StringIO(), width=140)
    for table in config.stash[TABLES]:
        console.print(table)
    output = console.file
    assert isinstance(output, StringIO)
    terminalreporter.write(output.getvalue())
