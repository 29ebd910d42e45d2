from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.model_selection import KFold, cross_val_predict

from lswag_fast import InputError, libra_plus
from lswag_fast.correlation import spearman
from lswag_fast.ensembles import libra_plus as module


def benchmark(rows: int = 300, seed: int = 0):
    """Accuracies that no single proxy ranks: a product of two, and one that falls after it has risen."""
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(3, rows))
    accuracy = hidden[0] + hidden[1] - hidden[2] ** 2 + 0.2 * generator.normal(size=rows)
    scores = {f"p{i}": np.exp(h + 0.1 * generator.normal(size=rows)) for i, h in enumerate(hidden)}
    return {**scores, "noise": generator.normal(size=rows)}, accuracy


def labels(rows: int, count: int = 50, seed: int = 0):
    return np.random.default_rng(seed).choice(rows, count, replace=False)


def test_it_ranks_unseen_architectures_better_than_any_proxy():
    scores, accuracy = benchmark()
    labelled = labels(300)
    result = libra_plus(scores, labelled, accuracy[labelled])
    unseen = np.setdiff1d(np.arange(300), labelled)
    rho = spearman(result.score[unseen], accuracy[unseen])
    assert result.score.shape == (300,)
    assert rho > 0.75
    assert rho > max(abs(spearman(values[unseen], accuracy[unseen])) for values in scores.values()) + 0.15
    assert result.model.cv_rho == pytest.approx(rho, abs=0.2)


def test_same_seed_same_bits_and_the_caller_keeps_its_random_numbers():
    scores, accuracy = benchmark(rows=100)
    labelled = labels(100, 30)
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    one, two = (libra_plus(scores, labelled, accuracy[labelled], seed=5) for _ in range(2))
    assert np.random.rand() == expected
    np.testing.assert_array_equal(one.score, two.score)
    assert not np.array_equal(one.score, libra_plus(scores, labelled, accuracy[labelled], seed=6).score)


def test_members_are_weighed_by_predictions_of_what_they_did_not_see():
    scores, accuracy = benchmark(rows=100)
    labelled = labels(100, 40)
    model = libra_plus(scores, labelled, accuracy[labelled], seed=2).model
    member = next(m for m in model.members if m.name == "extra trees")
    ranks = np.column_stack([np.argsort(np.argsort(values)) + 0.5 for values in scores.values()]) / 100
    target = accuracy[labelled]
    folds = KFold(5, shuffle=True, random_state=2)
    expected = cross_val_predict(member.estimator, ranks[labelled], (target - target.mean()) / target.std(), cv=folds)
    assert member.cv_rho == pytest.approx(spearman(expected, target))
    squares = [max(m.cv_rho, 0) ** 2 for m in model.members]
    assert [m.weight for m in model.members] == pytest.approx([s / sum(squares) for s in squares])
    assert (model.labels, model.proxies) == (40, ("p0", "p1", "p2", "noise"))


def test_scale_of_proxies_and_accuracies_does_not_matter():
    scores, accuracy = benchmark(rows=100)
    labelled = labels(100, 30)
    expected = libra_plus(scores, labelled, accuracy[labelled]).score
    scaled = {name: values**3 for name, values in scores.items()}
    np.testing.assert_array_equal(libra_plus(scaled, labelled, accuracy[labelled]).score, expected)
    # Trees break ties between splits by rounding errors of the accuracies.
    assert spearman(libra_plus(scores, labelled, 7 * accuracy[labelled] - 3).score, expected) > 0.99


def test_proxies_that_say_nothing_are_left_out_and_infinite_values_rank():
    scores, accuracy = benchmark(rows=100)
    labelled = labels(100, 30)
    expected = libra_plus(scores, labelled, accuracy[labelled])
    scores |= {"flat": np.zeros(100), "gone": np.full(100, np.nan)}
    scores["p0"] = np.where(scores["p0"] == scores["p0"].min(), -np.inf, scores["p0"])
    result = libra_plus(scores, labelled, accuracy[labelled])
    np.testing.assert_array_equal(result.score, expected.score)
    assert [note.split()[0] for note in result.model.notes] == ["flat", "gone"]
    scores["p1"][:5] = np.nan
    assert np.isfinite(libra_plus(scores, labelled, accuracy[labelled]).score).all()


def test_gaps_and_repeated_architectures_are_told():
    scores, accuracy = benchmark(rows=100)
    labelled = labels(100, 30)
    assert libra_plus(scores, labelled, accuracy[labelled]).model.notes == ()
    scores["p1"][3] = np.nan
    twice = {name: np.r_[values, values[5:7]] for name, values in scores.items()}
    notes = libra_plus(twice, labelled, accuracy[labelled]).model.notes
    assert notes[0] == "p1 is missing on 1 of 102 architectures, which have its mean rank"
    assert notes[1].startswith("2 rows equal another in every column")


def test_the_rho_of_cross_validation_has_an_interval_that_narrows_with_labels():
    scores, accuracy = benchmark()
    widths = []
    for count in (20, 200):
        labelled = labels(300, count)
        model = libra_plus(scores, labelled, accuracy[labelled]).model
        low, high = model.cv_interval
        assert low < model.cv_rho < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_one_proxy_is_enough():
    values = np.arange(60.0)
    labelled = labels(60, 20)
    result = libra_plus({"only": values}, labelled, np.sqrt(values[labelled]))
    assert spearman(result.score, values) > 0.98


def test_members_no_better_than_chance_weigh_alike():
    assert module._weights([-0.2, 0.0]).tolist() == [0.5, 0.5]
    assert module._weights([0.3, -0.2, 0.6]).tolist() == pytest.approx([0.2, 0, 0.8])


def test_the_average_is_of_predictions_on_one_scale():
    low, high = np.array([1.0, 2.0, 3.0]), np.array([500.0, 100.0, 300.0])
    standardised = [(p - p.mean()) / p.std() for p in (low, high)]
    found = module._average([low, high, np.full(3, 9.0)], np.array([0.6, 0.3, 0.1]))
    np.testing.assert_allclose(found, 0.6 * standardised[0] + 0.3 * standardised[1])


@pytest.mark.parametrize(
    ("labelled", "accuracies", "message"),
    [
        (range(9), range(9), "10 labelled architectures or more .* got 9"),
        ([*range(11), 10], range(12), "repeated: 10"),
        ([*range(11), 100], range(12), "rows from 0 to 99, got 100"),
        ([*range(11), -1], range(12), "got -1"),
        (range(12), range(11), "12 indices, 11 accuracies"),
        (range(12), [np.nan, *range(11)], "1 accuracies are not finite"),
        (range(12), [2.0] * 12, "every accuracy is 2"),
        (np.ones(100, bool), range(100), "numpy.flatnonzero"),
        (np.arange(12) / 1.0, range(12), "list of row indices"),
        ([[0, 1]] * 6, range(12), "list of row indices"),
        ([[0, 1], [2]], range(12), "list of row indices"),
    ],
)
def test_labels_that_cannot_be_used(labelled: object, accuracies: object, message: str):
    scores, _ = benchmark(rows=100)
    with pytest.raises(InputError, match=message):
        libra_plus(scores, labelled, accuracies)


@pytest.mark.parametrize("folds", [1, 13, 2.5, True])
def test_folds_that_cannot_be_used(folds: int):
    scores, _ = benchmark(rows=100)
    with pytest.raises(InputError, match="folds is a number from 2"):
        libra_plus(scores, range(12), range(12), folds=folds)


@pytest.mark.parametrize("seed", [-1, 0.5, True, 2**32])
def test_seeds_that_cannot_be_used(seed: int):
    scores, _ = benchmark(rows=100)
    with pytest.raises(InputError, match="seed is a number from 0"):
        libra_plus(scores, range(12), range(12), seed=seed)


def test_columns_of_different_lengths():
    with pytest.raises(InputError, match="lengths"):
        libra_plus({"a": range(30), "b": range(29)}, range(12), range(12))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    scores, _ = benchmark(rows=100)
    with pytest.raises(InputError, match=r"pip install 'lswag-fast\[lab\]'"):
        libra_plus(scores, range(12), range(12))
