from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lswag_fast import spaces
from lswag_fast.errors import InputError
from lswag_fast.laboratory import stores
from lswag_fast.laboratory.joining import joined
from lswag_fast.laboratory.tables import Table
from lswag_fast.proxies.result import Counts, PatternSaturation
from lswag_fast.records import Record, Row
from lswag_fast.store import Store

SPACE = spaces.get("autoformer-tiny", image_size=32, num_classes=10)
ARCHS = list(SPACE.sample(12, seed=1))


def keep(
    path: Path,
    seed: int,
    *,
    archs: list[Any] = ARCHS,
    groups: int = 4,
    images: str = "noise",
    drawn: bool = True,
    options: dict[str, Any] | None = None,
    proxies: dict[str, float] | None = None,
) -> str:
    """Records scores of `archs` with a seed, lswag being 100 * seed + place; returns the id of the settings."""
    options = {"seed": seed, "groups": groups, "device": "cpu", "dtype": "float32", **(options or {})}
    metadata = {
        "space": SPACE.options,
        "images": f"bytes {seed}",
        "labels": f"seed:{seed}",
        "weights": f"seed:{seed}",
        "options": options,
        "loss": "cross_entropy",
        "definition_version": 1,
        "samples": 4,
        "notes": {"images": f"{images}, seed {seed}" if drawn else images},
    }
    context = f"{seed}{groups}{images}" + 40 * "0"
    records = [
        Record(
            key=f"{context} {SPACE.encode(arch)}",
            arch=arch,
            status="ok",
            lswag=100.0 * seed + place,
            trainability=10.0 * seed + place,
            expressivity=place,
            pattern_saturation=PatternSaturation(0.5, None),
            proxies=proxies or {},
            counts=Counts(SPACE.params(arch), SPACE.macs(arch), 7.0 + place, 9),
        )
        for place, arch in enumerate(archs)
    ]
    with Store(path) as store, store.owner() as owner:
        run = store.begin_run(context, metadata)
        store.claim(owner, [r.key for r in records], len(records))
        store.commit(owner, [Row.of(r, run) for r in records])
    return context


def table(archs: list[Any] = ARCHS) -> Table:
    return Table("trained", tuple(archs), {"c100_acc": np.arange(len(archs), dtype=float)})


def test_seeds_are_repeats_and_counts_depend_on_none(tmp_path: Path):
    for seed in (0, 1, 2):
        keep(tmp_path / "s.db", seed)
    scores = stores.read([tmp_path / "s.db"])
    np.testing.assert_array_equal(scores.columns["lswag"], [np.arange(12) + 100 * seed for seed in (0, 1, 2)])
    np.testing.assert_array_equal(scores.columns["lambda"][2], np.arange(12) + 20)
    np.testing.assert_array_equal(scores.columns["psi"][0], np.arange(12))
    np.testing.assert_array_equal(scores.columns["parameters"], [[SPACE.params(arch) for arch in ARCHS]])
    assert scores.notes == ["3 repeats, seeds 0, 1, 2"]


def test_other_images_are_no_repeats_where_no_seed_draws_them(tmp_path: Path):
    keep(tmp_path / "s.db", 0, drawn=False)
    keep(tmp_path / "s.db", 1, drawn=False)
    scores = stores.read([tmp_path / "s.db"])
    np.testing.assert_array_equal(scores.columns["lswag"], [np.arange(12) + 100])
    assert "others need --context (04noise0)" in scores.notes[0]


def test_two_batches_of_one_seed_are_refused(tmp_path: Path):
    keep(tmp_path / "a.db", 0)
    keep(tmp_path / "b.db", 0)
    stores.read([tmp_path / "a.db", tmp_path / "b.db"])
    with Store(tmp_path / "b.db") as store:
        store._connection.execute("UPDATE runs SET metadata = replace(metadata, 'bytes 0', 'bytes x')")
    with pytest.raises(InputError, match=r"have seed 0 alike, but other images or labels"):
        stores.read([tmp_path / "a.db", tmp_path / "b.db"])


def test_lswag_alone_is_a_repeat_whether_its_options_name_it_or_not(tmp_path: Path):
    keep(tmp_path / "s.db", 0)
    keep(tmp_path / "s.db", 1)
    with Store(tmp_path / "s.db") as store:
        named = """'"options": {', '"options": {"proxies": [{"name": "lswag"}], '"""
        store._connection.execute(f"UPDATE runs SET metadata = replace(metadata, {named}) WHERE id = 1")
    assert stores.read([tmp_path / "s.db"]).columns["lswag"].shape == (2, 12)


def test_a_proxy_that_is_best_at_its_lowest_is_turned(tmp_path: Path):
    described = [
        {"name": "lswag"},
        {"name": "te_nas_ntk"},
        {"name": "mine", "class": "m.Mine", "lower_is_better": True},
    ]
    values = {"te_nas_ntk": 4.0, "mine": 2.0}
    keep(tmp_path / "s.db", 0, options={"proxies": [*described, {"name": "zico"}]}, proxies={**values, "zico": 3.0})
    scores = stores.read([tmp_path / "s.db"])
    assert {name: scores.columns[name][0, 0] for name in ("te_nas_ntk", "mine", "zico")} == {
        **{name: -value for name, value in values.items()},
        "zico": 3.0,
    }
    assert [note.split(" is ")[0] for note in scores.notes] == ["te_nas_ntk", "mine"]


def test_te_nas_and_az_nas_are_combined_by_ranks_where_their_parts_are_there(tmp_path: Path):
    generator = np.random.default_rng(0)
    kinds = ("expressivity", "progressivity", "trainability", "complexity")
    names = ("te_nas_regions", "te_nas_ntk", *(f"az_nas_{kind}" for kind in kinds))
    values = {name: generator.normal(size=12) for name in names}
    described = [{"name": "lswag"}, *({"name": name} for name in names)]
    path = tmp_path / "s.db"
    for place, arch in enumerate(ARCHS):
        proxies = {name: column[place] for name, column in values.items()}
        keep(path, 0, archs=[arch], options={"proxies": described}, proxies=proxies)
    found = stores.read([path]).columns
    ranks = {name: np.argsort(np.argsort(column)) + 1 for name, column in values.items()}
    np.testing.assert_array_equal(found["te_nas_by_ranks"][0], ranks["te_nas_regions"] + 13 - ranks["te_nas_ntk"])
    logs = np.mean([np.log(ranks[f"az_nas_{kind}"] / 12) for kind in kinds], axis=0)
    np.testing.assert_allclose(found["az_nas_by_ranks"][0], logs)
    keep(tmp_path / "t.db", 0, proxies={"te_nas_ntk": 1.0})
    assert not [name for name in stores.read([tmp_path / "t.db"]).columns if name.endswith("_by_ranks")]


def test_several_stores_come_together(tmp_path: Path):
    keep(tmp_path / "a.db", 0)
    keep(tmp_path / "b.db", 1, archs=ARCHS[::-1])
    scores = stores.read([tmp_path / "a.db", tmp_path / "b.db"])
    np.testing.assert_array_equal(scores.columns["lswag"], [np.arange(12), 111 - np.arange(12)])


def test_chosen_seeds_alone_are_read(tmp_path: Path):
    for seed in (0, 1, 2):
        keep(tmp_path / "s.db", seed)
    assert stores.read([tmp_path / "s.db"], seeds=[1, 2]).columns["lswag"][:, 0].tolist() == [100, 200]


def test_other_settings_are_told_and_can_be_chosen(tmp_path: Path):
    old = keep(tmp_path / "s.db", 0)
    keep(tmp_path / "s.db", 1, groups=2)
    keep(tmp_path / "s.db", 2, groups=2, images="photos")
    newest = stores.read([tmp_path / "s.db"])
    assert newest.columns["lswag"][:, 0].tolist() == [200]
    assert "the newest settings, 22photos, are studied; others need --context (04noise0, 12noise0)" in newest.notes
    assert stores.read([tmp_path / "s.db"], context=old[:2]).columns["lswag"][:, 0].tolist() == [0]
    with pytest.raises(InputError, match="no settings have an id that begins with 'x'"):
        stores.read([tmp_path / "s.db"], context="x")


def test_sparse_repeats_are_left_out_and_named(tmp_path: Path):
    keep(tmp_path / "s.db", 0)
    keep(tmp_path / "s.db", 7, archs=ARCHS[:5])
    scores = stores.read([tmp_path / "s.db"])
    assert scores.columns["lswag"].shape == (1, 12)
    assert scores.notes == ["seeds with less than half of the architectures are left out: 7 (5)"]


def test_architectures_match_in_every_spelling_of_the_space(tmp_path: Path):
    keep(tmp_path / "s.db", 0)
    scores = stores.read([tmp_path / "s.db"])
    published = [{"hidden_dim": arch["embed_dim"], **{n: arch[n] for n in arch if n != "embed_dim"}} for arch in ARCHS]
    mixed = [*published[:6], *(SPACE.encode(arch) for arch in ARCHS[6:]), {"depth": 99}]
    (task,) = joined([scores], [table(mixed)], [])
    assert task.proxies["lswag"].tolist() == [list(range(12))]
    assert task.accuracy.tolist() == list(range(12))
    assert task.counts == ["parameters", "multiply_adds", "sum_log_numel", "positions"]
    assert '1 rows of trained have no scores: {"depth":99} (an arch has exactly' in task.notes[-1]


def test_a_store_without_scores_is_told(tmp_path: Path):
    Store(tmp_path / "s.db").close()
    assert stores.is_store(tmp_path / "s.db")
    assert not stores.is_store(tmp_path / "absent.db")
    with pytest.raises(InputError, match="holds no scores"):
        stores.read([tmp_path / "s.db"])
