from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lswag_fast import Scorer, cli, score, spaces
from lswag_fast.correlation import partial_spearman
from lswag_fast.errors import InputError
from lswag_fast.layer_figure import draw
from lswag_fast.layer_statistics import (
    PERCENTILES,
    LayerStatistics,
    layer_statistics,
    suggest_window,
    window_trainability,
)
from lswag_fast.proxies.result import LayerRow
from lswag_fast.reference import percentile
from lswag_fast.store import Store


def network(log_sigma: list[float], terms: list[float] | None = None, **changes: Any) -> list[LayerRow]:
    """Rows with these values, one a layer."""
    count = len(log_sigma)
    given = terms or [1.0] * count
    fields = {"numel": 9, "in_window": True, "dead": 0, "mean_abs_gradient": 1.0, "slow": None, **changes}
    return [
        LayerRow(
            name=f"layer{i}",
            index=i + 1,
            percentile=percentile(i + 1, count),
            log_sum_inverse_sigma=given[i],
            log_sum_mean_over_sigma=2 * given[i],
            mean_sigma=math.exp(log_sigma[i]),
            **fields,
        )
        for i in range(count)
    ]


def random_networks(n: int, layers: int, seed: int = 0) -> list[list[LayerRow]]:
    draw_from = np.random.default_rng(seed)
    return [network(list(draw_from.normal(-5, 1, layers)), list(draw_from.normal(9, 1, layers))) for _ in range(n)]


def test_profiles_are_means_and_deviations_over_networks_of_the_mean_in_each_percentile() -> None:
    networks = random_networks(7, 23) + random_networks(5, 12, seed=1)
    found = layer_statistics(iter(networks))
    assert found.depths() == {12: 5, 23: 7}
    for chosen, statistics in ((networks, found), (networks[:7], found.having(23)), (networks[7:], found.having(12))):
        profile = statistics.profile()
        assert profile.networks == len(chosen)
        for place, at in enumerate(PERCENTILES):
            of = [[math.log(r.mean_sigma or 0) for r in rows if r.percentile == at] for rows in chosen]
            means = [sum(values) / len(values) for values in of if values]
            assert profile.mean[place] == pytest.approx(np.mean(means))
            assert profile.std[place] == pytest.approx(np.std(means))
    term = found.term_profile()
    assert term.mean[3] == pytest.approx(
        np.mean([sum(r.log_sum_inverse_sigma or 0 for r in rows if r.percentile == 30) for rows in networks])
    )


def test_dead_layers_and_empty_percentiles_are_left_out() -> None:
    rows = network([-1.0, -2.0, -3.0])  # percentiles 30, 60 and 100
    rows[1] = LayerRow("dead", 2, 60, 9, True, 9, None, None, 0.0, 0.0, None)
    found = layer_statistics([rows, network([-1.0, -4.0, -3.0])])
    mean = found.profile().mean
    assert [mean[PERCENTILES.index(p)] for p in (30, 60, 100)] == pytest.approx([-1, -4, -3])
    assert np.isnan(np.delete(mean, [3, 6, 10])).all()
    assert found.terms[0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["log_sigma"]["mean"][0] is None


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("spikes", [(40,), (50, 60), (0,), (80, 90)])
@pytest.mark.parametrize("slope", [0.0, -0.4])
def test_known_spikes_give_the_known_window(side: int, spikes: tuple[int, ...], slope: float) -> None:
    draw_from = np.random.default_rng(3)
    networks = []
    for _ in range(40):
        layers = [slope * percentile(i + 1, 40) / 10 + draw_from.normal(0, 0.1) for i in range(40)]
        raised = [v + side * 2 * (percentile(i + 1, 40) in spikes) for i, v in enumerate(layers)]
        networks.append(network([*raised[:-1], 9.0]))  # the last layer lies off every trend
    found = layer_statistics(networks).suggestion()
    assert found.window == (spikes[0], spikes[-1])
    assert found.spikes == spikes
    assert ("above" if side > 0 else "below") in found.reason


def test_the_strongest_run_is_taken_and_all_spikes_are_told() -> None:
    mean = np.zeros(11)
    mean[1], mean[6], mean[7] = 2.0, 1.5, 1.5
    found = suggest_window(mean)
    assert found.window == (60, 70)
    assert found.spikes == (10, 60, 70)
    mean[7] = -1.5  # a peak and a dip side by side are two runs
    assert suggest_window(mean).window == (10, 10)


@pytest.mark.parametrize(("height", "spikes"), [(0.62, ()), (0.68, (50,))])
def test_a_spike_is_an_outlier_of_three_and_a_half_modified_z_scores(height: float, spikes: tuple[int, ...]) -> None:
    """All distances but that of 50 are 0 or 0.125, so their median is 0.125 and the threshold 0.649."""
    mean = np.array([0.125, -0.125, 0, 0.125, -0.125, height, -0.125, 0.125, 0, -0.125, 0.125])
    assert suggest_window(mean).spikes == spikes


def test_without_a_spike_the_window_is_the_whole_network() -> None:
    for mean in (np.zeros(11), -0.7 * np.arange(11), np.where(np.arange(11) == 4, 0.09, 0.0)):
        found = suggest_window(mean)
        assert (found.window, found.spikes) == ((0, 100), ())
        assert "nothing stands out" in found.reason
    sparse = np.where(np.arange(11) % 3 == 0, 1.0, np.nan)
    assert "only 4 percentiles" in suggest_window(sparse).reason


def test_window_rho_is_that_of_the_summed_terms() -> None:
    networks = random_networks(30, 15)
    accuracy = np.random.default_rng(5).normal(size=30)
    for numerator in ("one", "mean"):
        found = layer_statistics(networks, numerator=numerator)
        rho = found.window_rho(accuracy)
        for i, j in ((0, 10), (3, 3), (2, 6)):
            window = (PERCENTILES[i], PERCENTILES[j])
            sums = [window_trainability(rows, window, numerator=numerator) for rows in networks]
            assert found.trainability(window) == pytest.approx(sums)
            assert rho[i, j] == pytest.approx(stats.spearmanr(sums, accuracy).statistic)
        assert np.isnan(rho[np.tril_indices(11, -1)]).all()
    places = np.array([4, 2, 9, 20])
    chosen = layer_statistics([networks[p] for p in places]).window_rho(accuracy[places])
    np.testing.assert_array_equal(layer_statistics(networks).window_rho(accuracy[places], places), chosen)


def test_bad_input_is_told() -> None:
    with pytest.raises(InputError, match="got none"):
        layer_statistics([])
    with pytest.raises(InputError, match="network 2 was scored over a window"):
        layer_statistics([network([1.0]), network([1.0], in_window=False)])
    with pytest.raises(InputError, match="network 1 has no layers"):
        layer_statistics([[]])
    found = layer_statistics(random_networks(3, 4))
    with pytest.raises(InputError, match=r"a network \(3\), got 2 numbers"):
        found.window_rho([1.0, 2.0])
    with pytest.raises(InputError, match="1 of them not finite"):
        found.window_rho([1.0, 2.0, math.nan])


def test_the_rows_of_one_score_hold_the_lambda_of_every_window() -> None:
    space = spaces.get("nasbench201", image_size=8)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    archs = list(space.sample(3, seed=1))
    with Scorer(space, images, device="cpu", dtype="float32") as scorer:
        records = {space.encode(record.arch): record for record in scorer.score(archs)}
    statistics = layer_statistics(records[space.encode(arch)].layers for arch in archs)
    for window in ((0, 100), (30, 60), (100, 100)):
        for place, arch in enumerate(archs):
            labels = scorer.labels
            result = score(space.build(arch), images, labels, groups=2, window=window, dtype="float32")
            rows = records[space.encode(arch)].layers
            assert window_trainability(rows, window) == pytest.approx(result.trainability, rel=1e-7)
            assert statistics.trainability(window)[place] == pytest.approx(result.trainability, rel=1e-7)


def test_figure_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'lswag-fast\[lab\]'"):
        draw(layer_statistics(random_networks(3, 12)))


def test_command_writes_figures_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    space = spaces.get("nasbench201", image_size=8)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    two_convolutions = [(2, op, 0, 3, other, 0) for op in (0, 1, 4) for other in (0, 1, 4)]
    archs = [*two_convolutions, (3, 0, 0, 2, 0, 0), (2, 2, 0, 2, 0, 0), (2, 0, 3, 2, 0, 0), (3, 0, 0, 0, 0, 0)]
    with Scorer(space, images, store="s.db", device="cpu", dtype="float32") as scorer:
        layers = {space.encode(record.arch): record.layers for record in scorer.score(archs)}
    accuracy = {str(arch): 50.0 + place for place, arch in enumerate(archs)}
    lines = [f'"{arch}",{value}' for arch, value in accuracy.items()]
    Path("a.csv").write_text("\n".join(["arch,cifar10", *reversed(lines), '"(1, 1, 1, 1, 1, 1)",9']))

    code, out, err = command(capsys, monkeypatch, "layers", "--store", "s.db", "--accuracies", "a.csv", "--output", "o")
    assert (code, err) == (0, "")
    assert "13 networks; suggested window" in out
    data = json.loads(Path("o/layers.json").read_text())
    statistics = layer_statistics(layers[str(arch)] for arch in archs)
    expected = statistics.window_rho(list(accuracy.values()))
    assert data["accuracies"]["cifar10"]["rho_of_the_whole"] == pytest.approx(expected[0, 10])
    assert data["accuracies"]["cifar10"]["rho_by_percentile"][4] == pytest.approx(expected[4, 4])
    windows = data["accuracies"]["cifar10"]["windows"]
    assert windows["whole"]["spearman"] == pytest.approx(expected[0, 10])
    assert windows["whole"]["spearman_low"] <= expected[0, 10] <= windows["whole"]["spearman_high"]
    order = {space.encode(arch): place for place, arch in enumerate(archs)}
    records = [None] * len(archs)
    with Store(Path("s.db"), read_only=True) as kept:
        for record in kept.records():
            records[order[space.encode(record.arch)]] = record
    names = ("parameters", "multiply_adds", "sum_log_numel", "positions")
    counts = [[getattr(record.counts, name) for record in records] for name in names]
    partial = partial_spearman(statistics.trainability((0, 100)), list(accuracy.values()), counts)
    assert windows["whole"]["partial"] == pytest.approx(partial)
    assert "given the counts (parameters, multiply_adds, sum_log_numel, positions): " in out
    assert "1 rows of a have no scores: (1, 1, 1, 1, 1, 1)" in out
    check_by_depth(data, statistics, np.array(list(accuracy.values())))
    for figure in Path("o").glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")

    sizes = ("--space", "nasbench201", "--image-size", "8", "--samples", "4", "--images", "noise", "--count", "1")
    command(capsys, monkeypatch, "score", *sizes, "--store", "w.db", "--device", "cpu", "--window", "10", "50")
    code, _, err = command(capsys, monkeypatch, "layers", "--store", "w.db")
    assert code == 2
    assert "are of the window (10, 50); layer statistics need scores of the whole network" in err


def check_by_depth(data: dict[str, Any], statistics: LayerStatistics, accuracy: np.ndarray) -> None:
    frequent = [number for number, networks in statistics.depths().items() if networks >= 10]
    assert list(data["by_number_of_layers"]) == [str(number) for number in frequent]
    for number in frequent:
        here = statistics.layers == number
        expected = statistics.having(number).window_rho(accuracy[here])
        found = data["by_number_of_layers"][str(number)]["accuracies"]["cifar10"]
        assert found["rho_of_the_whole"] == pytest.approx(expected[0, 10])
        assert Path(f"o/layers-{number}.png").exists()


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["lswag-fast", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err
