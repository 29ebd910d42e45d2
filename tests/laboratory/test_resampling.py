from __future__ import annotations

import numpy as np
import pytest

from lswag_fast import correlation
from lswag_fast.laboratory import resampling

ROWS, DRAWS, TOP = 40, 12, 6


def sample() -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(0)
    x, y, a, b = generator.integers(0, 12, size=(4, ROWS)).astype(float)
    return x + y, y, a + 0.5 * y, b


def repeated(weights: np.ndarray) -> list[np.ndarray]:
    return [np.repeat(np.arange(ROWS), row.astype(int)) for row in weights]


def test_first_weights_are_the_sample_itself_and_each_resample_is_as_large():
    weights = resampling.resamples(ROWS, DRAWS)
    assert weights.shape == (1 + DRAWS, ROWS)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == ROWS).all()
    assert len({row.tobytes() for row in weights}) == 1 + DRAWS


@pytest.mark.parametrize("largest", [0, 2000])
def test_statistics_of_weights_are_those_of_the_repeated_rows(largest: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resampling, "_PAIRWISE_ROWS", largest)
    x, y, a, b = sample()
    weights = resampling.resamples(ROWS, DRAWS)
    ranks = {name: resampling.centred_ranks(v, weights) for name, v in {"x": x, "y": y, "a": a, "b": b}.items()}
    found = {
        "spearman": resampling.spearman(ranks["x"], ranks["y"], weights),
        "partial": resampling.partial_spearman(ranks["x"], ranks["y"], np.array([ranks["a"], ranks["b"]]), weights),
        "kendall": resampling.kendall(x, y, weights),
        "precision": resampling.precision_at_top(x, y, TOP, weights),
        "regret": resampling.regret(x, y, weights),
    }
    for place, rows in enumerate(repeated(weights)):
        expected = {
            "spearman": correlation.spearman(x[rows], y[rows]),
            "partial": correlation.partial_spearman(x[rows], y[rows], [a[rows], b[rows]]),
            "kendall": correlation.kendall_tau(x[rows], y[rows]),
            "precision": correlation.precision_at_top(x[rows], y[rows], TOP),
            "regret": correlation.regret(x[rows], y[rows]),
        }
        for name, value in expected.items():
            assert found[name][place] == pytest.approx(value, abs=1e-9), (name, place)


def test_constant_values_have_no_correlation():
    x, y, a, _ = sample()
    weights = resampling.resamples(ROWS, 2)
    flat, ranks, given = (resampling.centred_ranks(v, weights) for v in (0 * x, y, a))
    assert np.isnan(resampling.spearman(flat, ranks, weights)).all()
    assert np.isnan(resampling.kendall(0 * x, y, weights)).all()
    assert np.isnan(resampling.partial_spearman(flat, ranks, given[None], weights)).all()


def test_nothing_is_left_of_what_the_counts_determine():
    _, y, a, b = sample()
    weights = resampling.resamples(ROWS, 5)
    ranks = [resampling.centred_ranks(v, weights) for v in (a**3, y, a, b)]
    assert np.isnan(resampling.partial_spearman(ranks[0], ranks[1], np.array(ranks[2:]), weights)).all()


def test_equal_counts_are_one_count():
    x, y, a, _ = sample()
    weights = resampling.resamples(ROWS, 3)
    rx, ry, ra = (resampling.centred_ranks(v, weights) for v in (x, y, a))
    once = resampling.partial_spearman(rx, ry, np.array([ra]), weights)
    assert resampling.partial_spearman(rx, ry, np.array([ra, ra]), weights) == pytest.approx(once)
