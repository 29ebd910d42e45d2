"""Times on a GPU by its own events, and the rates that shares are taken of."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

ROUNDS = 20
PRODUCT = 8192
COPY_BYTES = 2**32
SLEEP_CYCLES, CYCLES_A_SECOND = 20_000_000, 2_000_000_000


def timed(call: Callable[[], Any], rounds: int = ROUNDS, *, waits: bool = False) -> dict[str, float]:
    """Returns the median seconds of a call on the device, and of its launch on the host.

    The device first sleeps, longer than a launch takes, so that it is the device that is timed and not the launch; a
    call that `waits` for the device is timed by the clock instead.
    """
    launch = 0.0
    for _ in range(3):
        began = time.perf_counter()
        call()
        launch = time.perf_counter() - began
    torch.cuda.synchronize()
    cycles = max(SLEEP_CYCLES, int(2 * launch * CYCLES_A_SECOND))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    host = []
    for start, end in events:
        if not waits:
            torch.cuda._sleep(cycles)
        start.record()
        began = time.perf_counter()
        call()
        host.append(time.perf_counter() - began)
        end.record()
        torch.cuda.synchronize()
    if waits:
        return {"seconds": median(host), "host_seconds": median(host)}
    return {"seconds": median(a.elapsed_time(b) for a, b in events) / 1e3, "host_seconds": median(host)}


def rates() -> dict[str, float]:
    """Returns what this GPU does at most: bytes a second of a copy (read and written), bf16 FLOP a second."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * COPY_BYTES / timed(lambda: target.copy_(source))["seconds"]
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * PRODUCT**3 / timed(lambda: a @ b)["seconds"]
    return {"copy_bytes_per_second": copy, "bfloat16_flops_per_second": product}
