from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from lswag_fast import correlation
from lswag_fast.errors import InputError
from lswag_fast.laboratory import report
from lswag_fast.laboratory.study import STATISTICS, Row, Task, TaskStudy, study

N = 60


def task(**proxies: np.ndarray) -> Task:
    """A task whose accuracy follows `params` and, less so, `good`, which knows something of its own."""
    generator = np.random.default_rng(5)
    params, own, noise = generator.normal(size=(3, N))
    values = {
        "good": params + own,
        "as_count": params**3,
        "nearly_count": params + 0.05 * generator.normal(size=N),
        "reversed": -(params + own),
        "params": params,
        **proxies,
    }
    archs = [f"arch {place}" for place in range(N)]
    rows = {name: np.atleast_2d(v) for name, v in values.items()}
    return Task("toy", archs, 70 + params + own + 0.3 * noise, rows, ("params",))


def row(done: TaskStudy, proxy: str) -> Row:
    return next(r for r in done.rows if r.proxy == proxy)


def test_every_statistic_is_that_of_its_definition():
    toy = task()
    (done,) = study([toy], top=7, draws=50)
    for r in done.rows:
        x, y = toy.proxies[r.proxy][0], toy.accuracy
        expected = {
            "spearman": correlation.spearman(x, y),
            "kendall": correlation.kendall_tau(x, y),
            "precision": correlation.precision_at_top(x, y, 7),
            "regret": correlation.regret(x, y),
        }
        assert {name: r.estimates[name].value for name in expected} == pytest.approx(expected)
    partial = row(done, "good").estimates["partial"].value
    assert partial == pytest.approx(
        correlation.partial_spearman(toy.proxies["good"][0], toy.accuracy, toy.proxies["params"])
    )


def test_interval_is_that_of_resampled_architectures():
    toy = task()
    (done,) = study([toy], draws=1000)
    x, y = toy.proxies["good"][0], toy.accuracy
    low, high = correlation.bootstrap(lambda rows: correlation.spearman(x[rows], y[rows]), N)
    found = row(done, "good").estimates["spearman"]
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    assert found.low < found.value < found.high


def test_rows_come_best_first_and_name_the_nearest_count():
    (done,) = study([task()], draws=50)
    rho = [r.estimates["spearman"].value for r in done.rows]
    assert rho == sorted(rho, reverse=True)
    assert row(done, "as_count").closest_count == "params"
    assert row(done, "as_count").rho_with_count == pytest.approx(1)
    assert row(done, "params").is_count
    assert "partial" not in row(done, "params").estimates


def test_a_proxy_that_ranks_as_its_counts_is_told():
    (done,) = study([task()], draws=200)
    assert any("params determine its ranking" in text for text in row(done, "as_count").warnings)
    assert any("ranks as its counts do: rho is" in text for text in row(done, "nearly_count").warnings)
    assert not row(done, "good").warnings
    assert any("the wrong way round" in text for text in row(done, "reversed").warnings)


def test_constant_and_missing_proxies_stay_in_the_table():
    some = np.where(np.arange(N) < 9, np.arange(N, dtype=float), np.nan)
    gaps = np.where(np.arange(N) < 5, np.nan, np.arange(N, dtype=float) % 17)
    infinite = np.where(np.arange(N) < 5, np.inf, np.arange(N, dtype=float))
    (done,) = study([task(flat=np.full(N, 3.0), some=some, gaps=gaps, infinite=infinite)], draws=50)
    assert {r.proxy: r.status for r in done.rows if r.status != "ok"} == {"flat": "constant", "some": "missing"}
    assert row(done, "flat").warnings == ("is 3 for every architecture",)
    assert "values for 9 of 60" in row(done, "some").warnings[0]
    assert row(done, "gaps").architectures == N - 5
    assert "no value for 5 of 60" in row(done, "gaps").warnings[0]
    kept = slice(5, None)
    expected = correlation.spearman(gaps[kept], done.task.accuracy[kept])
    assert row(done, "gaps").estimates["spearman"].value == pytest.approx(expected)
    assert row(done, "infinite").architectures == N


def test_a_proxy_of_one_task_is_missing_in_the_other():
    other = replace(task(alone=np.arange(N, dtype=float)), name="other")
    first, second = study([task(), other], draws=20)
    assert row(first, "alone").status == "missing"
    assert row(second, "alone").status == "ok"


def test_chosen_proxies_are_studied_beside_the_counts():
    (done,) = study([task()], draws=20, proxies=["good"])
    assert {r.proxy for r in done.rows} == {"good", "params"}
    with pytest.raises(InputError, match=r"no table holds a proxy called zico; there are good, as_count"):
        study([task()], proxies=["zico"])


def test_repeats_give_mean_spread_and_each_value():
    generator = np.random.default_rng(6)
    toy = task()
    seeds = toy.accuracy + generator.normal(scale=[[0.1], [1.0], [3.0]], size=(3, N))
    (done,) = study([replace(toy, proxies={"noisy": seeds, "params": toy.proxies["params"]})], draws=100)
    found = row(done, "noisy").estimates["spearman"]
    expected = [correlation.spearman(v, toy.accuracy) for v in seeds]
    assert found.by_repeat == pytest.approx(expected)
    assert found.value == pytest.approx(np.mean(expected))
    assert found.spread == pytest.approx(np.std(expected, ddof=1))
    assert done.repeats == 3
    assert math.isnan(row(done, "params").estimates["spearman"].spread)


def test_a_repeat_without_a_ranking_is_told():
    toy = task()
    values = np.stack([toy.accuracy, np.ones(N)])
    (done,) = study([replace(toy, proxies={"half": values})], draws=50)
    assert row(done, "half").estimates["spearman"].value == pytest.approx(1)
    assert "constant in 1 of 2 repeats" in row(done, "half").warnings[0]


def test_a_proxy_constant_in_every_repeat_says_whether_they_agree():
    toy = task()
    repeats = {"same": np.full((2, N), 3.0), "other": np.full((2, N), [[3.0], [4.0]])}
    (done,) = study([replace(toy, proxies=repeats)], draws=20)
    assert row(done, "same").warnings == ("is 3 for every architecture",)
    assert row(done, "other").warnings[0].endswith("of the first repeat, and constant in the others too")


def test_architectures_without_accuracy_are_named():
    toy = task()
    accuracy = toy.accuracy.copy()
    accuracy[[3, 4, 5, 6]] = np.nan
    (done,) = study([replace(toy, accuracy=accuracy)], draws=20)
    assert done.architectures == N - 4
    assert done.task.notes[-1].endswith("have no accuracy and are left out: arch 3; arch 4; arch 5 and 1 others")


@pytest.mark.parametrize(
    ("broken", "arguments", "message"),
    [
        (
            lambda t: replace(t, accuracy=t.accuracy[:-1]),
            {},
            r"accuracy needs one value an architecture \(60\).* got 59",
        ),
        (lambda t: replace(t, proxies={"p": np.ones((1, 59))}), {}, r"toy: p needs one value an architecture"),
        (lambda t: replace(t, accuracy=np.full(N, np.nan)), {}, "0 architectures have both"),
        (lambda t: replace(t, accuracy=np.full(N, 7.0)), {}, "all 60 accuracies are 7"),
        (lambda t: t, {"top": 60}, "the top must be 1 to 59"),
        (lambda t: t, {"draws": 5}, "20 draws or more"),
        (lambda t: replace(t, proxies={}), {}, "no proxy to study"),
    ],
)
def test_what_cannot_be_studied_is_refused(broken, arguments, message):
    with pytest.raises(InputError, match=message):
        study([broken(task())], **arguments)


def test_a_table_without_counts_is_told():
    toy = task()
    (done,) = study([replace(toy, proxies={"good": toy.proxies["good"]}, counts=())], draws=20)
    assert done.task.notes == (
        "no column counts parameters or the like, so it is not known what proxies tell beyond counts",
    )
    assert "partial" not in row(done, "good").estimates


def test_few_architectures_for_the_counts_are_told():
    toy = task()
    assert not study([toy], draws=20)[0].task.notes
    counts = {f"count {place}": np.roll(np.arange(N, dtype=float), 7 * place)[None] for place in range(6)}
    many = replace(toy, proxies={**toy.proxies, **counts}, counts=("params", *counts))
    (note,) = study([many], draws=20)[0].task.notes
    assert note.startswith("60 architectures are few for partial correlations given 7 counts")


def test_flat_rows_are_json_without_nan():
    (done,) = study([task(flat=np.zeros(N))], draws=20)
    data = json.loads(report.as_json([done]), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    rows = data["tasks"][0]["proxies"]
    assert [r["proxy"] for r in rows] == [r.proxy for r in done.rows]
    assert {f"{name}{part}" for name in STATISTICS for part in ("", "_low", "_high", "_spread")} <= rows[0].keys()
    flat = next(r for r in rows if r["proxy"] == "flat")
    assert flat["status"] == "constant"
    assert flat["spearman"] is None
