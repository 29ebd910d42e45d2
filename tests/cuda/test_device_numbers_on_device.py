"""Numbers that kernel arguments bring to a device."""

from __future__ import annotations

import pytest
import torch

from lswag_fast import _C


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("count", [0, 1, 127, 4088, 4089, 20_000])
def test_every_number_arrives_and_nothing_else_is_written(count: int) -> None:
    numbers = torch.randint(-(2**63), 2**63 - 1, (count,))
    room = torch.full((count + 64,), 7, device="cuda")
    _C.cuda_write_numbers(numbers, room[32:], torch.cuda.current_stream().cuda_stream)
    numbers_before = numbers.clone()
    numbers.zero_()
    assert torch.equal(room[32 : 32 + count].cpu(), numbers_before)
    assert bool((room[:32] == 7).all() and (room[32 + count :] == 7).all())


def test_what_is_no_table_on_a_device_is_refused() -> None:
    numbers = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="on a CUDA device, got DLPack device type 1"):
        _C.cuda_write_numbers(numbers, numbers, 0)
    with pytest.raises(ValueError, match="numbers must be contiguous int64"):
        _C.cuda_write_numbers(numbers.float(), numbers, 0)
