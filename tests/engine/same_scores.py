"""What tests of candidates that share memory need: results held to the same bits, and memory made useless between."""

from __future__ import annotations

from dataclasses import replace

from lswag_fast import LswagResult
from lswag_fast.engine.autoformer import AutoFormerEngine


def assert_same(found: LswagResult, expected: LswagResult) -> None:
    """Holds a result to the same bits but for the times."""
    assert without_times(found) == without_times(expected)


def without_times(result: LswagResult) -> LswagResult:
    return replace(result, seconds=0.0, proxy_seconds={})


def poison(engine: AutoFormerEngine) -> None:
    """Overwrites all static memory that is lent to nobody."""
    for memory in engine.pool.memories:
        for buffer in memory.buffers if memory.is_free else ():
            buffer.fill_(255)
