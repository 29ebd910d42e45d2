from __future__ import annotations

import numpy as np
import pytest

from lswag_fast.errors import InputError
from lswag_fast.laboratory.joining import joined, own_tasks, scores_of
from lswag_fast.laboratory.tables import Table

N = 12
ARCHS = tuple(f"({place}, 0)" for place in range(N))


def column(first: float = 0.0) -> np.ndarray:
    return first + np.arange(N, dtype=float)


def accuracies(archs: tuple[str, ...] = ARCHS, **columns: np.ndarray) -> Table:
    return Table("trained", archs, columns or {"val_accuracy": column(70)})


def scores(archs: tuple[str, ...] = ARCHS, **columns: np.ndarray) -> Table:
    return Table("scored", archs, columns or {"zico": column(), "params": column(5)})


def test_rows_match_by_architecture_whatever_their_order():
    order = np.random.default_rng(0).permutation(N)
    shuffled = accuracies(tuple(ARCHS[i] for i in order), val_accuracy=column(70)[order])
    (task,) = joined([scores_of(scores(), [])], [shuffled], [])
    assert task.name == "trained"
    assert (task.accuracy - task.proxies["zico"][0] == 70).all()
    assert list(task.counts) == ["params"]
    assert task.notes == ()


def test_what_does_not_match_is_counted_and_named():
    table = accuracies((*ARCHS[1:], "(9, 9)"))
    (task,) = joined([scores_of(scores(), [])], [table], [])
    assert len(task.archs) == N - 1
    assert task.notes == (
        "11 architectures have scores and a row of accuracies; 1 scored ones have no row in trained; 1 rows of trained "
        "have no scores: (9, 9)",
    )


def test_fewer_than_ten_in_common_is_refused_with_examples():
    strangers = accuracies(tuple(f"other {i}" for i in range(N)))
    with pytest.raises(InputError, match=r"have 0 architectures in common.*other 0; other 1.*scores are of \(0, 0\)"):
        joined([scores_of(scores(), [])], [strangers], [])


def test_repeated_architectures_have_the_mean_of_their_rows():
    archs = (*ARCHS, ARCHS[0], ARCHS[0])
    table = accuracies(archs, val_accuracy=np.append(column(70), [72, np.nan]))
    (task,) = joined([scores_of(scores(), [])], [table], [])
    assert len(task.archs) == N
    assert task.accuracy[0] == 71
    assert task.notes == ("1 architectures stand several times in trained and have the mean of their rows: (0, 0)",)


def test_columns_of_accuracies_are_found_or_named():
    table = accuracies(c100_kd_acc=column(), flower_acc=column(1), params=column(2))
    source = scores_of(scores(), [])
    assert [task.name for task in joined([source], [table], [])] == ["c100_kd_acc", "flower_acc"]
    assert [task.name for task in joined([source], [table], ["params"])] == ["params"]
    unnamed = accuracies(cifar10=column(), cifar100=column(1), params=column(2))
    assert [task.name for task in joined([source], [unnamed], [])] == ["cifar10", "cifar100"]
    with pytest.raises(InputError, match=r"no accuracies called svhn; the columns are cifar10, cifar100, params"):
        joined([source], [unnamed], ["svhn"])


def test_tasks_of_several_sources_have_names_of_their_own():
    other = Table("scored twice", ARCHS, {"zico": column()})
    tasks = joined([scores_of(scores(), []), scores_of(other, [])], [accuracies()], [])
    assert [task.name for task in tasks] == ["scored: trained", "scored twice: trained"]


def test_own_accuracies_are_no_proxies():
    table = Table("nb", ARCHS, {"val_accuracy": column(70), "zico": column(), "flops": column()}, ("remark",))
    (task,) = own_tasks(table, [])
    assert task.name == "nb"
    assert set(task.proxies) == {"zico", "flops"}
    assert task.notes == ("columns of nb without numbers are not used: remark",)
    with pytest.raises(InputError, match=r"scored has no column of accuracies .* --accuracies"):
        own_tasks(scores(), [])
