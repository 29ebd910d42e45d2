"""Starts one kernel twice by a Launch, and prints what the launcher of the installed Triton was given; needs no GPU.

Triton compiles the kernel and calls its launcher itself the first time, the Launch does so the second time. Only the
driver, which knows the device, is a stand-in.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lswag_fast.kernels.launch import Launch


@triton.jit(do_not_specialize=["first"])
def add_one(source, absent, target, first, count, BLOCK: tl.constexpr):
    place = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < count) + 1, mask=place < count)


def launcher(src: Any, metadata: Any) -> Any:
    """What a compiled kernel is started by: it prints where it would start it, and with what."""
    return lambda *given: print(json.dumps([plain(value) for value in given]))


def plain(value: Any) -> Any:
    """A value as JSON; of a tensor its address, of anything else that JSON has no form of its type's name."""
    if isinstance(value, Tensor):
        return {"tensor": value.data_ptr()}
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, (int, float, str)) else type(value).__name__


def main() -> None:
    """Prints a line a launch."""
    utils = SimpleNamespace(
        load_binary=lambda *given: (5, 7, 0, 0, 1024),  # module, function, registers, spills, threads
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
    )
    stand_in: Any = SimpleNamespace(
        utils=utils,
        launcher_cls=launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 100,
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
    )
    driver.set_active(stand_in)
    launch = Launch(add_one, torch.device("cpu"), {"count": 200, "BLOCK": 64, "num_warps": 2})
    source, target = torch.zeros(2, 256)
    for _ in range(2):
        launch.start((3, 2), (source, None, target), (9,))


if __name__ == "__main__":
    main()
