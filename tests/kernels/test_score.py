"""A whole score through the Triton kernels: interpreted on the CPU where there is no CUDA device."""

from __future__ import annotations

import pytest
import torch

from lswag_fast import spaces
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.options import ScoreOptions

pytestmark = pytest.mark.filterwarnings("ignore:Psi is at:UserWarning")

SPACE = spaces.get("autoformer-tiny", image_size=32, num_classes=5)
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_candidate_scores_as_in_cpp(device: torch.device, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    supernet, arch = SPACE.supernet(seed=1), next(SPACE.sample(1, seed=0))

    def scored(on: str, precision: str) -> dict[str, float]:
        options = ScoreOptions(device=on, dtype=precision).resolved(4)
        engine = AutoFormerEngine(supernet, images, torch.arange(4), None, options)
        result = engine.score(arch)
        terms = {row.name: row.log_sum_inverse_sigma for row in result.layers}
        assert all(term is not None for term in terms.values())
        return {name: term for name, term in terms.items() if term is not None}

    found = scored(device.type, dtype)
    monkeypatch.delenv("LSWAG_BACKEND")
    expected = scored("cpu", "float32")
    assert found == pytest.approx(expected, rel=0, abs=TOLERANCE[dtype])
    assert found != expected
