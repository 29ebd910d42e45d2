"""Whole AutoFormer-Tiny candidates: log terms, patterns and ranking against the committed float64 scores."""

from __future__ import annotations

from typing import Any

import float64_ranking as ranking
import numpy as np
import pytest
import torch
from torch import Tensor

import lswag_fast
from lswag_fast import reference
from lswag_fast.images import ImageBatch
from lswag_fast.spaces import AutoFormerSupernet

pytestmark = pytest.mark.filterwarnings("ignore:Psi is at:UserWarning")

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}
RANKED_STRATA = ((192, 13), (216, 13), (240, 13))
"""Whole strata of one depth, neighbours in score; `float64_ranking.py --check` ranks all of them."""

PATTERN_SAMPLES = 24
"""At 16 samples every network has all 65,536 patterns; at 24 a single wrong bit shows."""


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return ranking.read_scores()[1]


@pytest.fixture(scope="module")
def eight(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Eight candidates, of eight strata."""
    firsts = [rows[0] for rows in ranking.strata([line["arch"] for line in lines]).values()]
    return [lines[i] for i in firsts[:8]]


@pytest.fixture(scope="module")
def data() -> ImageBatch:
    return ranking.batch()


@pytest.fixture(scope="module")
def supernet() -> AutoFormerSupernet:
    return ranking.supernet()


def test_float64_scores_are_those_of_200_fixed_candidates(lines: list[dict[str, Any]]):
    header, _ = ranking.read_scores()
    assert header["settings"] == ranking.settings()
    assert [line["arch"] for line in lines] == ranking.candidates()
    assert len(lines) == 200
    assert len(ranking.strata(ranking.candidates())) == 9


def test_bfloat16_ranks_as_float64(supernet: AutoFormerSupernet, data: ImageBatch, lines: list[dict[str, Any]]):
    ranked = [line for line in lines if (line["arch"]["embed_dim"], line["arch"]["depth"]) in RANKED_STRATA]
    found = ranking.rank(supernet, data, ranked, "bfloat16")
    assert len(found["tau_by_stratum"]) == len(RANKED_STRATA)
    assert found["tau"] >= 0.99, found
    assert min(found["tau_by_stratum"].values()) >= 0.95, found


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_log_term_is_that_of_float64(
    supernet: AutoFormerSupernet, data: ImageBatch, eight: list[dict[str, Any]], dtype: str
):
    assert len(eight) == 8
    for line in eight:
        result = lswag_fast.score(supernet.subnet(line["arch"]), data.images, data.labels, dtype=dtype)
        assert ranking.log_term_error(result, line) <= TOLERANCE[dtype]
        assert [row.dead for row in result.layers] == line["dead"]
        assert result.expressivity == line["expressivity"]
        assert result.counts.positions == line["positions"]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_psi_is_exact_on_the_activations_of_the_score(
    supernet: AutoFormerSupernet, eight: list[dict[str, Any]], dtype: str
):
    images = torch.randn(PATTERN_SAMPLES, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    for line in eight:
        candidate = supernet.subnet(line["arch"])
        activations = ranking.gelu_signs(candidate)
        # Psi counts up to the end of the window; gradients of the last layer alone spare the test their time.
        result = lswag_fast.score(candidate, images, dtype=dtype, window=(100, 100))
        words = torch.cat([_words(a) for a in activations])
        assert len(words) == line["positions"]
        assert result.expressivity == len(np.unique(words.numpy()))


def test_words_are_the_patterns_of_the_reference():
    activation = torch.randn(PATTERN_SAMPLES, 50, generator=torch.Generator().manual_seed(2))
    expected = [int.from_bytes(word, "little") for word in reference.pattern_words(activation)]
    assert _words(activation > 0).tolist() == expected


def _words(signs: Tensor) -> Tensor:
    """Returns the pattern of every position of signs [S, ...] as a number, for S up to 31."""
    words = torch.zeros(signs[0].numel(), dtype=torch.int32)
    for n, row in enumerate(signs.flatten(1)):
        words |= row.int() << n
    return words
