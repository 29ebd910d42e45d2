"""A pytest plugin by which tests run to their end whatever they compare: in a rehearsal a device's numbers are rubbish.

Each `assert` beneath tests/ is evaluated, so that an error in it is one, and then passed over; so are
torch.testing.assert_close, and what the package itself refuses of values that a device has checked. A test in which an
error is awaited that hangs on numbers is counted as an expected failure.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

import pytest
import torch
from torch import Tensor

from lswag_fast import InputError, value_checks

TESTS = Path(__file__).resolve().parents[2] / "tests"


class Evaluated(ast.NodeTransformer):
    """Turns each `assert test, message` into the truth of `test`."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        return ast.copy_location(ast.Expr(ast.UnaryOp(ast.Not(), node.test)), node)


class Loader(SourceFileLoader):
    """Loads a module with its asserts passed over; compiled, it is kept nowhere."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = Evaluated().visit(ast.parse(self.get_data(path)))
        code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
        return code


class Finder(MetaPathFinder):
    """Finds the modules beneath tests/."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        if TESTS not in Path(spec.origin).resolve().parents:
            return None
        spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def pytest_configure() -> None:
    sys.meta_path.insert(0, Finder())
    torch.testing.assert_close = lambda *_, **__: None
    judge = value_checks.LateChecks.judge

    def judge_all(late: value_checks.LateChecks, numbers: Mapping[str, Tensor]) -> None:
        with suppress(InputError):
            judge(late, numbers)

    value_checks.LateChecks.judge = judge_all  # type: ignore[assignment, method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None and hangs_on_numbers(call.excinfo.value):
        report.outcome, report.wasxfail = "skipped", "an error that hangs on numbers"
    return report


def hangs_on_numbers(error: BaseException) -> bool:
    """Whether pytest.raises says that there was no error, or one with another text."""
    return isinstance(error, (pytest.fail.Exception, AssertionError)) and (
        "DID NOT RAISE" in str(error) or "pattern did not match" in str(error)
    )
