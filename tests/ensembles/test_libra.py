from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

import lswag_fast
from lswag_fast import InputError, libra
from lswag_fast.correlation import bootstrap

Columns = dict[str, NDArray[np.float64]]


def benchmark(
    seed: int, rows: int = 60, noise: float = 0.6
) -> tuple[Columns, NDArray[np.float64], NDArray[np.float64]]:
    """Six proxies of about the same rho, accuracies and parameter counts."""
    generator = np.random.default_rng(seed)
    params = generator.normal(size=rows)
    accuracy = params + generator.normal(size=rows)
    scores = {f"p{i}": accuracy + i / 5 * params + noise * generator.normal(size=rows) for i in range(6)}
    return scores, accuracy, params


def slow_choice(scores: Columns, accuracy: NDArray[np.float64], params: NDArray[np.float64], bins: int) -> list[str]:
    """Algorithm 1 from its definition, by loops over architectures."""

    def binned(values: NDArray[np.float64]) -> list[int]:
        return [int((rank - 0.5) * bins / len(values)) for rank in rankdata(values)]

    def entropy(keys: list[tuple[int, ...]]) -> float:
        return -sum(c / len(keys) * math.log2(c / len(keys)) for c in Counter(keys).values())

    def gain(name: str) -> float:
        y, first, second = binned(accuracy), binned(scores[best]), binned(scores[name])
        by_first = entropy(list(zip(y, first, strict=True))) - entropy([(z,) for z in first])
        by_both = entropy(list(zip(y, first, second, strict=True))) - entropy(list(zip(first, second, strict=True)))
        return round(by_first - by_both, 12)

    def bias(values: NDArray[np.float64]) -> float:
        return float(np.corrcoef(rankdata(values), rankdata(params))[0, 1])

    rhos = {name: float(spearmanr(values, accuracy)[0]) for name, values in scores.items()}
    best = max(rhos, key=lambda name: rhos[name])
    by_rho = sorted(rhos, key=lambda name: -rhos[name])
    chosen, near = [best], [name for name in by_rho if name != best and rhos[best] - 0.1 < rhos[name]]
    if near:
        chosen.append(min(near, key=gain))
        near.remove(chosen[1])
    if near:
        chosen.append(min(near, key=lambda name: abs(bias(scores[name]) - bias(accuracy))))
    return chosen


@given(st.integers(0, 10_000), st.integers(2, 12))
@settings(max_examples=40)
def test_the_choice_is_that_of_algorithm_1(seed: int, bins: int):
    scores, accuracy, params = benchmark(seed)
    generator = np.random.default_rng(seed)
    scores |= {f"far{i}": accuracy + i * generator.normal(size=len(accuracy)) for i in (1, 2, 3)}
    result = libra(scores, accuracy, params, bins=bins, resamples=0)
    expected = slow_choice(scores, accuracy, params, bins)
    assert list(result.names) == expected
    assert all(
        c.in_reach == (c.name != expected[0] and result.candidates[0].rho - 0.1 < c.rho) for c in result.candidates
    )
    np.testing.assert_allclose(result.score, sum(rankdata(scores[name]) for name in expected))
    assert result.rho == pytest.approx(spearmanr(result.score, accuracy)[0])


def test_the_choice_is_explained_with_its_figures():
    scores, accuracy, params = benchmark(3)
    result = libra(scores, accuracy, params)
    assert len(result.names) == len(result.reasons) == 3
    by_name = {c.name: c for c in result.candidates}
    first, second, third = (by_name[name] for name in result.names)
    assert f"z1 = {first.name}: of 6 proxies" in result.reasons[0]
    assert f"{first.rho:.3f}" in result.reasons[0]
    assert f"{second.information_gain:.3f} bits" in result.reasons[1]
    assert f"{third.bias:.3f}" in result.reasons[2]
    assert f"{result.accuracy_bias:.3f}" in result.reasons[2]
    assert math.isnan(first.information_gain)
    assert not first.in_reach
    assert [c.rho for c in result.candidates] == sorted((c.rho for c in result.candidates), reverse=True)


def test_the_interval_is_of_resampled_architectures_and_repeats():
    scores, accuracy, params = benchmark(4, rows=200)
    result = libra(scores, accuracy, params)
    assert result.interval == libra(scores, accuracy, params).interval
    low, high = result.interval
    assert low < result.rho < high
    # Fisher's approximation of the standard error of a correlation.
    assert high - low == pytest.approx(2 * 1.96 * (1 - result.rho**2) / math.sqrt(200), rel=0.35)
    without = libra(scores, accuracy, params, resamples=0)
    assert all(math.isnan(end) for end in (*without.interval, *without.candidates[0].interval))


def test_every_candidate_has_an_interval():
    scores, accuracy, params = benchmark(4, rows=100)
    scores["p2"][:3] = np.nan
    for candidate in libra(scores, accuracy, params).candidates:
        present = ~np.isnan(scores[candidate.name])
        x, y = scores[candidate.name][present], accuracy[present]
        expected = bootstrap(lambda rows, x=x, y=y: spearmanr(x[rows], y[rows])[0], len(x))
        assert candidate.interval == pytest.approx(expected)


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_neither_direction_nor_scale_of_a_proxy_matters(seed: int):
    scores, accuracy, params = benchmark(seed)
    expected = libra(scores, accuracy, params, resamples=0)
    changed = {name: -np.exp(values) if i % 2 else 3 * values for i, (name, values) in enumerate(scores.items())}
    result = libra(changed, accuracy, np.exp(params), resamples=0)
    assert result.names == expected.names
    np.testing.assert_array_equal(result.score, expected.score)
    assert [c.sign for c in sorted(result.candidates, key=lambda c: c.name)] == [1, -1] * 3


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_the_order_of_architectures_does_not_matter(seed: int):
    scores, accuracy, params = benchmark(seed)
    order = np.random.default_rng(seed).permutation(len(accuracy))
    expected = libra(scores, accuracy, params, resamples=0)
    result = libra({n: v[order] for n, v in scores.items()}, accuracy[order], params[order], resamples=0)
    assert result.names == expected.names
    np.testing.assert_array_equal(result.score, expected.score[order])


def test_the_letter_of_the_paper_takes_rho_as_it_is():
    scores, accuracy, params = benchmark(5)
    scores |= {"backwards": -accuracy}
    assert libra(scores, accuracy, params).names[0] == "backwards"
    assert "after being turned round" in libra(scores, accuracy, params).reasons[0]
    assert "backwards" not in libra(scores, accuracy, params, oriented=False).names


def test_only_backward_proxies_and_the_letter_of_the_paper():
    scores, accuracy, params = benchmark(6)
    result = libra({name: -values for name, values in scores.items()}, accuracy, params, oriented=False)
    assert result.rho < 0
    assert any("every rho is negative" in note for note in result.notes)


@pytest.mark.parametrize(("others", "names"), [(0, 1), (1, 2)])
def test_too_few_others_in_reach(others: int, names: int):
    scores, accuracy, params = benchmark(7, noise=0.05)
    far = {"far": np.random.default_rng(0).normal(size=len(accuracy))}
    result = libra({**dict(list(scores.items())[: others + 1]), **far}, accuracy, params)
    assert len(result.names) == len(result.reasons) == names
    assert any("fewer than three are combined" in note for note in result.notes)


def test_constant_and_missing_proxies_are_left_out_and_said():
    scores, accuracy, params = benchmark(8)
    expected = libra(scores, accuracy, params)
    rows = len(accuracy)
    scores |= {
        "flat": np.full(rows, -1e8),
        "none": np.full(rows, np.nan),
        "few": np.r_[np.full(7, np.nan), accuracy[7:]],
    }
    result = libra(scores, accuracy, params)
    assert result.names == expected.names
    np.testing.assert_array_equal(result.score, expected.score)
    assert "flat is left out: it is -1e+08 on every architecture" in result.notes
    assert "none is left out: it is missing on 60 of 60 architectures" in result.notes
    assert "few is left out: it is missing on 7 of 60 architectures" in result.notes


def test_a_missing_value_has_the_mean_rank():
    scores, accuracy, params = benchmark(9)
    scores = {"only": accuracy.copy()}
    scores["only"][5] = np.nan
    result = libra(scores, accuracy, params)
    assert result.candidates[0].rho == pytest.approx(1)
    assert result.score[5] == (len(accuracy) + 1) / 2
    assert any("only is missing on 1 of 60" in note for note in result.notes)
    listed = {"only": [None if np.isnan(v) else v for v in scores["only"]]}
    np.testing.assert_array_equal(libra(listed, accuracy, params).score, result.score)


def test_accuracies_that_are_not_known_have_no_say():
    scores, accuracy, params = benchmark(10)
    known = np.r_[accuracy[:40], np.full(20, np.nan)]
    result = libra(scores, known, params)
    alone = libra({n: v[:40] for n, v in scores.items()}, accuracy[:40], params[:40])
    assert result.names == alone.names
    assert [c.information_gain for c in result.candidates[1:]] == [c.information_gain for c in alone.candidates[1:]]
    np.testing.assert_array_equal(result.score, sum(rankdata(scores[name]) for name in result.names))
    assert result.rho == pytest.approx(spearmanr(result.score[:40], accuracy[:40])[0])


def test_ties_and_equal_proxies_take_the_first_named():
    accuracy = np.repeat(np.arange(5.0), 4)
    params = np.tile(np.arange(4.0), 5)
    scores = {name: accuracy.copy() for name in ("c", "a", "b", "d")}
    result = libra(scores, accuracy, params)
    assert result.names == ("c", "a", "b")
    assert result.rho == pytest.approx(1)


def test_repeated_rows_are_pointed_out():
    scores, accuracy, params = benchmark(11)
    twice = {name: np.r_[values, values[:3]] for name, values in scores.items()}
    result = libra(twice, np.r_[accuracy, accuracy[:3]], np.r_[params, params[:3]])
    assert any(note.startswith("3 rows equal another in every column") for note in result.notes)
    assert not libra(scores, accuracy, params).notes


def test_bias_by_another_column_and_by_none():
    scores, accuracy, params = benchmark(12)
    result = libra(scores, accuracy, params, bias="p5")
    assert {c.name: c.bias for c in result.candidates}["p5"] == pytest.approx(1)
    depths = np.random.default_rng(3).integers(12, 15, len(params))
    by_depth = libra(scores, accuracy, params, bias=depths.tolist())
    assert by_depth.accuracy_bias == pytest.approx(spearmanr(accuracy, depths)[0])
    assert by_depth.names == libra(scores, accuracy, depths).names
    assert "the ranking by the column given as bias" in by_depth.reasons[2]
    flat = libra(scores, accuracy, np.ones(len(params)))
    assert len(flat.names) == 2
    assert any("no z3: params is the same for all architectures" in note for note in flat.notes)


def test_options_of_combination():
    scores, accuracy, params = benchmark(13)
    result = libra(scores, accuracy, params, combine="mean_log_rank")
    assert result.names == libra(scores, accuracy, params).names
    expected = np.mean([np.log(rankdata(scores[name]) / len(accuracy)) for name in result.names], axis=0)
    np.testing.assert_allclose(result.score, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": np.arange(59.0)}, "59 accuracies, but 60 values of p0"),
        ({"params": np.arange(59.0)}, "got 59 for 60 accuracies"),
        ({"params": np.full(60, np.nan)}, "60 are not"),
        ({"accuracy": np.full(60, 3.0)}, "every known accuracy is 3"),
        ({"accuracy": np.r_[np.inf, np.arange(59.0)]}, "infinite"),
        ({"accuracy": np.r_[np.arange(9.0), np.full(51, np.nan)]}, "got 9 known of 60"),
        ({"accuracy": ["high"] * 60}, "accuracy must be a list of numbers"),
        ({"scores": {}}, "scores maps names"),
        ({"scores": [1, 2]}, "scores maps names"),
        ({"scores": {"flat": np.zeros(60)}}, "no proxy can be used"),
        ({"scores": {"text": ["a"] * 60}}, r"scores\['text'\] must be a list of numbers"),
        ({"bias": "depth"}, "bias is 'params', a proxy of scores"),
        ({"bias": [1.0, 2.0]}, "a bias column needs one value an architecture, got 2 for 60"),
        ({"combine": "product"}, "combine is one of rank_sum, mean_log_rank"),
        ({"binning": "equal"}, "binning is one of"),
        ({"bins": 0}, "bins is None"),
        ({"resamples": -1}, "resamples is a number"),
        ({"scores": {"one": 3.0}}, r"scores\['one'\] must be a list of numbers"),
    ],
)
def test_input_that_cannot_be_used(changes: dict[str, object], message: str):
    scores, accuracy, params = benchmark(14)
    arguments = {"scores": scores, "accuracy": accuracy, "params": params, **changes}
    with pytest.raises(InputError, match=message):
        libra(**arguments)


def test_fewer_than_ten_architectures():
    scores, accuracy, params = benchmark(15, rows=9)
    with pytest.raises(InputError, match="10 architectures or more"):
        libra(scores, accuracy, params)


def test_public_names():
    assert {"libra", "libra_plus"} <= set(lswag_fast.__all__)
