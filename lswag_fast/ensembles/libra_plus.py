"""A combination of proxies learnt from a few trained architectures, by estimators of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..correlation import Floats, spearman
from ..errors import InputError
from ..laboratory.resampling import spearman_interval
from .table import MIN_ROWS, notes_of_rows, numbers, rankings, read_table

_RESAMPLES = 1000

Features = Literal["ranks", "rank differences", "normal scores"]
Target = Literal["accuracy", "normal scores"]


@dataclass(frozen=True)
class Member:
    """One estimator of the average, fitted on all labelled architectures."""

    name: str
    features: Features  # what it sees of the proxies
    target: Target  # what it learns: the accuracy, or its ranking among the labelled as normal scores
    cv_rho: float  # Spearman's rho of its predictions for labelled architectures left out of its fit
    weight: float  # its share of the average
    estimator: Any  # the fitted scikit-learn estimator


@dataclass(frozen=True)
class LibraPlusModel:
    """How :func:`libra_plus` combined the proxies."""

    proxies: tuple[str, ...]  # those used, in the order of the features
    members: tuple[Member, ...]
    cv_rho: float  # of the average, from the same left-out predictions as the weights: slightly flattering
    cv_interval: tuple[float, float]  # of cv_rho: 95 %, over resampled labelled architectures
    labels: int
    notes: tuple[str, ...]  # proxies left out or with gaps, and architectures that may be given twice


@dataclass(frozen=True)
class LibraPlus:
    """A score for every architecture, and the model it came from."""

    score: Floats  # [N], higher is better; its scale means nothing
    model: LibraPlusModel


@dataclass(frozen=True)
class _Recipe:
    name: str
    features: Features
    target: Target
    build: Callable[[int, int], Any]  # (columns of its features, seed) -> estimator


def libra_plus(
    scores: Mapping[str, Sequence[float]],
    labelled: Sequence[int],
    accuracy_of_labelled: Sequence[float],
    *,
    seed: int = 0,
    folds: int = 5,
) -> LibraPlus:
    """Learns from 20 to 100 trained architectures how to combine proxies, and scores all architectures by it.

    Six estimators are fitted on the labelled architectures: extremely randomised trees on the ranks by each proxy and
    on their differences, gradient boosting, kernel ridge regression with a Gaussian and a Laplacian kernel, and ridge
    regression. Their standardised predictions are averaged with weights max(rho, 0)^2, where rho is each one's Spearman
    correlation in cross-validation inside the labelled sample. At 50 labels no single one can be told to be the best,
    and the average beats a choice of one, of a few, or of weights by regression.

    The accuracies of other architectures are never seen. Their proxy scores are: ranks are those among all N
    architectures of `scores`. The result is deterministic for a seed, and for a version of scikit-learn. An
    architecture that is given twice and labelled once is no test of what is learnt: give it once (a note tells where
    rows are equal).

    Args:
        scores: proxies by name, each one value an architecture, [N]; NaN where missing (the mean rank is taken).
            Constant proxies and those missing on more than a tenth of the architectures are left out.
        labelled: indices of the labelled architectures, from 0 to N - 1, distinct, ten or more.
        accuracy_of_labelled: their accuracies, in that order, higher is better.
        seed: of the trees, of boosting, and of the folds.
        folds: of the cross-validation, from 2 to the number of labels.

    Raises InputError for indices that are out of range, repeated or fewer than ten, accuracies of another length, not
    finite or all equal, a table that `libra` would not take, and where scikit-learn is not installed.
    """
    table = read_table(scores)
    rows = _indices(labelled, table.rows)
    accuracy = _accuracies(accuracy_of_labelled, rows)
    _check_options(seed, folds, len(rows))
    recipes = _recipes()
    features = _features(list(table.columns.values()))
    targets = {"accuracy": (accuracy - accuracy.mean()) / accuracy.std(), "normal scores": _normal_scores(accuracy)}
    left_out = [_left_out(r, features[r.features][rows], targets[r.target], seed, folds) for r in recipes]
    cv_rhos = [_rho(predicted, accuracy) for predicted in left_out]
    weights = _weights(cv_rhos)
    estimators = [_fit(r, features[r.features][rows], targets[r.target], seed) for r in recipes]
    predictions = [e.predict(features[r.features]) for r, e in zip(recipes, estimators, strict=True)]
    members = tuple(
        Member(r.name, r.features, r.target, rho, float(weight), estimator)
        for r, rho, weight, estimator in zip(recipes, cv_rhos, weights, estimators, strict=True)
    )
    judged = _average(left_out, weights)
    interval = spearman_interval(judged, accuracy, _RESAMPLES)
    notes = (*table.notes, *notes_of_rows(table.columns))
    model = LibraPlusModel(tuple(table.columns), members, _rho(judged, accuracy), interval, len(rows), notes)
    return LibraPlus(_average(predictions, weights), model)


def _recipes() -> tuple[_Recipe, ...]:
    try:
        import scipy  # noqa: F401
        from sklearn.ensemble import ExtraTreesRegressor, GradientBoostingRegressor
        from sklearn.kernel_ridge import KernelRidge
        from sklearn.linear_model import RidgeCV
    except ImportError as error:
        raise InputError(
            "libra_plus needs scikit-learn and SciPy, which are not installed: pip install 'lswag-fast[lab]'"
        ) from error

    def trees(_: int, seed: int) -> Any:
        return ExtraTreesRegressor(n_estimators=100, random_state=seed)

    def boosting(_: int, seed: int) -> Any:
        return GradientBoostingRegressor(
            n_estimators=100, max_depth=2, learning_rate=0.08, subsample=0.6, max_features=0.5, random_state=seed
        )

    def ridge(_: int, __: int) -> Any:
        return RidgeCV(alphas=np.logspace(-2, 3, 11))

    # A kernel's width grows with the number of features, and with it the distance between two architectures.
    def gaussian(columns: int, _: int) -> Any:
        return KernelRidge(kernel="rbf", gamma=0.4 / columns, alpha=0.5)

    def laplacian(columns: int, _: int) -> Any:
        return KernelRidge(kernel="laplacian", gamma=3.6 / columns, alpha=0.1)

    return (
        _Recipe("extra trees", "ranks", "accuracy", trees),
        _Recipe("extra trees on differences", "rank differences", "accuracy", trees),
        _Recipe("gradient boosting", "ranks", "accuracy", boosting),
        _Recipe("Gaussian kernel ridge", "normal scores", "normal scores", gaussian),
        _Recipe("Laplacian kernel ridge", "ranks", "normal scores", laplacian),
        _Recipe("ridge", "ranks", "normal scores", ridge),
    )


def _features(columns: Sequence[Floats]) -> dict[Features, Floats]:
    """Returns each kind of features, [N, columns]."""
    ranks = np.column_stack([_unit_ranks(values) for values in columns])
    one, other = np.triu_indices(len(columns), 1)
    return {
        "ranks": ranks,
        "rank differences": np.hstack([ranks, ranks[:, one] - ranks[:, other]]),
        "normal scores": np.column_stack([_normal_scores(values) for values in columns]),
    }


def _unit_ranks(values: Floats) -> Floats:
    return np.asarray((rankings(values) - 0.5) / len(values))


def _normal_scores(values: Floats) -> Floats:
    from scipy.special import ndtri

    return np.asarray(ndtri(_unit_ranks(values)))


def _fit(recipe: _Recipe, features: Floats, target: Floats, seed: int) -> Any:
    return recipe.build(features.shape[1], seed).fit(features, target)


def _left_out(recipe: _Recipe, features: Floats, target: Floats, seed: int, folds: int) -> Floats:
    """Returns a prediction for each labelled architecture by fits that did not see it."""
    from sklearn.model_selection import KFold

    predicted = np.empty(len(target))
    for seen, unseen in KFold(folds, shuffle=True, random_state=seed).split(features):
        predicted[unseen] = _fit(recipe, features[seen], target[seen], seed).predict(features[unseen])
    return predicted


def _rho(predicted: Floats, accuracy: Floats) -> float:
    rho = spearman(predicted, accuracy)
    return 0.0 if np.isnan(rho) else rho


def _weights(cv_rhos: Sequence[float]) -> Floats:
    """Returns weights of sum 1; equal ones where no member ranks any better than chance."""
    squares = np.square(np.clip(cv_rhos, 0.0, None))
    return np.asarray(squares / squares.sum() if squares.any() else np.full(len(cv_rhos), 1 / len(cv_rhos)))


def _average(predictions: Sequence[Floats], weights: Floats) -> Floats:
    """Returns the weighted mean of predictions brought to mean 0 and standard deviation 1; a constant one counts 0."""
    total = np.zeros(len(predictions[0]))
    for predicted, weight in zip(predictions, weights, strict=True):
        spread = predicted.std()
        if spread > 0:
            total += weight * (predicted - predicted.mean()) / spread
    return total


def _check_options(seed: int, folds: int, labels: int) -> None:
    if isinstance(folds, bool) or not isinstance(folds, int | np.integer) or not 2 <= folds <= labels:
        raise InputError(f"folds is a number from 2 to that of labels ({labels}), got {folds!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise InputError(f"seed is a number from 0 to 2^32 - 1, got {seed!r}")


def _indices(labelled: Sequence[int], rows: int) -> NDArray[np.intp]:
    try:
        indices = np.asarray(labelled)
    except ValueError as error:
        raise InputError(f"labelled is a list of row indices: {error}") from error
    if indices.ndim != 1 or (indices.size and not np.issubdtype(indices.dtype, np.integer)):
        raise InputError(
            f"labelled is a list of row indices, got an array of {indices.dtype} of shape {indices.shape}; turn a mask "
            f"into indices by numpy.flatnonzero"
        )
    if len(indices) < MIN_ROWS:
        raise InputError(
            f"libra_plus learns from {MIN_ROWS} labelled architectures or more (it is meant for 20 to 100), got "
            f"{len(indices)}"
        )
    outside = indices[(indices < 0) | (indices >= rows)]
    if outside.size:
        raise InputError(f"labelled has rows from 0 to {rows - 1}, got {', '.join(map(str, outside[:5]))}")
    values, counts = np.unique(indices, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"each architecture is labelled once; repeated: {', '.join(map(str, values[counts > 1][:5]))}")
    return indices.astype(np.intp)


def _accuracies(accuracy: Sequence[float], rows: NDArray[np.intp]) -> Floats:
    values = numbers("accuracy_of_labelled", accuracy)
    if len(values) != len(rows):
        raise InputError(
            f"each labelled architecture needs its accuracy: {len(rows)} indices, {len(values)} accuracies"
        )
    if not np.isfinite(values).all():
        raise InputError(
            f"{int((~np.isfinite(values)).sum())} accuracies are not finite; label only trained architectures"
        )
    if values.std() == 0:
        raise InputError(f"every accuracy is {values[0]:g}; nothing can be learnt from them")
    return values
