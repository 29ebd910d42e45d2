from __future__ import annotations

import pytest
import torch

from lswag_fast.capture import SampleAxis

SAMPLES, TOKENS, WIDTH = 3, 4, 5


@pytest.mark.parametrize("sample_major", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("told", ["on the host", "on a device"])
def test_a_folded_axis_is_split_by_its_order(sample_major: bool, axis: int, told: str) -> None:
    by_sample = torch.randn(SAMPLES, TOKENS, WIDTH)
    folded = (by_sample if sample_major else by_sample.transpose(0, 1)).flatten(0, 1).movedim(0, axis)
    order = sample_major if told == "on the host" else torch.tensor(sample_major)
    found = SampleAxis(axis, TOKENS, order).split(folded, SAMPLES)
    assert torch.equal(found, by_sample)
    assert (found.data_ptr() == folded.data_ptr()) == (told == "on the host")
