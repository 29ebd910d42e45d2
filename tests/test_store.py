from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lswag_fast import store as store_module
from lswag_fast.errors import StoreError
from lswag_fast.proxies.result import Counts, LayerRow, LswagResult, PatternSaturation
from lswag_fast.records import Record, Row
from lswag_fast.store import Store, network_file_system

NOBODY = 65534
LAYER = LayerRow("head.weight", 1, 100, 12, True, 1, 1.0 / 3.0, None, 1e-30, 0.25, "no rule")
RESULT = LswagResult(
    lswag=12.0,
    trainability=1.5,
    expressivity=8,
    pattern_saturation=PatternSaturation(0.5, None),
    counts=Counts(100, 200, 3.25, 16),
    layers=(LAYER, replace(LAYER, index=2, log_sum_inverse_sigma=None)),
    patterns_by_activation=(5, 3),
    uncovered=("odd",),
    warnings=("careful",),
    proxies={"lswag": 12.0, "nwot": math.nan},
    proxy_seconds={"lswag": 0.125, "nwot": 0.0625},
    proxy_details={},
    seconds=0.125,
    options={},
)


def record(key: str, lswag: float = 12.0) -> Record:
    return Record.of(key, {"width": 3}, replace(RESULT, lswag=lswag))


def failed(key: str) -> Record:
    return Record(key, {"width": 3}, "error", "RuntimeError: out of memory")


def filled(store: Store, *records: Record) -> list[Record]:
    run = store.begin_run("context", {"samples": 8})
    with store.owner() as owner:
        return store.commit(owner, [Row.of(r, run) for r in records])


@contextmanager
def as_nobody() -> Iterator[None]:
    """The superuser may write anywhere; permissions are tested as somebody else."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_record_comes_back_as_it_was_committed(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as store:
        committed = filled(store, record("a"), failed("b"))
    with Store(tmp_path / "s.db", read_only=True) as store:
        found = store.find(["a", "b", "c"])
        assert list(store.records()) == [found["a"], found["b"]]
    assert [replace(found[key], reused=False) for key in ("a", "b")] == committed
    assert found["a"].reused
    kept = found["a"]
    assert (kept.lswag, kept.counts, kept.warnings, kept.uncovered) == (12.0, RESULT.counts, ("careful",), ("odd",))
    assert kept.layers[0] == replace(LAYER, log_sum_inverse_sigma=0.333333333)
    assert kept.layers[1].log_sum_inverse_sigma is None
    assert kept.proxies == {"lswag": 12.0, "nwot": None}
    assert kept.proxy_seconds == RESULT.proxy_seconds
    assert found["b"].error == "RuntimeError: out of memory"


def test_score_that_is_not_finite_is_a_failure() -> None:
    for lswag in (float("nan"), float("inf"), float("-inf")):
        assert record("a", lswag).status == "error"
        assert "not finite" in str(record("a", lswag).error)


def test_no_record_is_written_over_except_a_failed_one(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as store:
        filled(store, record("a", 1.0), failed("b"))
        again = filled(store, record("a", 2.0), record("b", 2.0))
        assert [(r.lswag, r.reused) for r in again] == [(1.0, True), (2.0, False)]
        assert {key: r.lswag for key, r in store.find(["a", "b"]).items()} == {"a": 1.0, "b": 2.0}


def test_top_ranks_finished_candidates_of_one_context(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as store:
        filled(store, *(record(str(n), float(n)) for n in range(5)), failed("f"))
        other = store.begin_run("other", {})
        with store.owner() as owner:
            store.commit(owner, [Row.of(record("x", 99.0), other)])
        assert [r.lswag for r in store.top(3, "context")] == [4.0, 3.0, 2.0]
        assert [(run.context, run.candidates, run.failed) for run in store.runs()] == [
            ("context", 6, 1),
            ("other", 1, 0),
        ]


def test_top_ranks_by_any_proxy(tmp_path: Path) -> None:
    values = {"a": 1.0, "b": 3.0, "c": None, "d": 2.0}
    with Store(tmp_path / "s.db") as store:
        filled(store, *(replace(record(key), proxies={"nwot": value}) for key, value in values.items()))
        assert [r.key for r in store.top(4, "context", by="nwot")] == ["b", "d", "a"]
        assert store.top(4, "context", by="zico") == []


def test_infinite_proxy_is_kept_and_ranked(tmp_path: Path) -> None:
    values = {"a": 1.0, "b": -math.inf, "c": math.nan, "d": math.inf, "e": -2.0}
    records = [Record.of(key, {}, replace(RESULT, proxies={"nwot": value})) for key, value in values.items()]
    with Store(tmp_path / "s.db") as store:
        filled(store, *records)
        assert [r.key for r in store.top(9, "context", by="nwot")] == ["d", "a", "e", "b"]
        assert [r.key for r in store.top(2, "context", by="nwot", lowest=True)] == ["b", "e"]
        found = {r.key: r for r in store.records()}
    assert {key: r.proxies["nwot"] for key, r in found.items()} == {**values, "c": None}
    texts = [json.loads(json.dumps(r.to_dict(), allow_nan=False))["proxies"]["nwot"] for r in found.values()]
    assert texts == [1.0, "-Infinity", None, "Infinity", -2.0]


def test_store_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with Store(path) as store:
        filled(store, record("a"))
    to_version_1(path)
    with Store(path, read_only=True) as store:
        check_version_1(store)
    with Store(path) as store:
        assert store.find(["a"])["a"].proxies == {}
        filled(store, record("b"))
    with Store(path, read_only=True) as store:
        assert store.find(["b"])["b"].proxies["lswag"] == 12.0


def to_version_1(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE records DROP COLUMN proxies")
        connection.execute("ALTER TABLE records DROP COLUMN proxy_seconds")
        connection.execute("PRAGMA user_version = 1")
    connection.close()


def check_version_1(store: Store) -> None:
    found = [store.find(["a"])["a"], *store.records(), *store.records(layers=False), *store.top(5, "context")]
    assert [(r.lswag, r.proxies, r.proxy_seconds, len(r.layers)) for r in found] == [
        (12.0, {}, {}, layers) for layers in (2, 2, 0, 0)
    ]
    assert store.top(5, "context", by="nwot") == []


def test_equal_runs_are_one() -> None:
    with Store(None) as store:
        assert store.begin_run("c", {"a": 1}) == store.begin_run("c", {"a": 1}) != store.begin_run("c", {"a": 2})


def test_claims_are_exclusive_until_released() -> None:
    with Store(None) as store, store.owner() as first, store.owner() as second:
        run = store.begin_run("c", {})
        assert store.claim(first, ["a", "b"], 1) == {"a"}
        assert store.claim(second, ["a", "b"], 5) == {"b"}
        store.commit(first, [])
        assert store.claim(second, ["a", "b"], 5) == {"a"}
        store.commit(second, [Row.of(record("a"), run)])
        assert store.claim(first, ["a", "b"], 5) == {"b"}


def test_failed_record_is_claimed_again_only_when_asked() -> None:
    with Store(None) as store, store.owner() as owner:
        filled(store, failed("a"), record("b"))
        assert store.claim(owner, ["a", "b"], 5) == set()
        assert store.claim(owner, ["a", "b"], 5, retry_before=time.time() + 1) == {"a"}


def test_claim_of_a_generator_that_has_gone_is_free() -> None:
    with Store(None) as store:
        with store.owner() as gone:
            assert store.claim(gone, ["a"], 1) == {"a"}
        with store.owner() as owner:
            assert store.claim(owner, ["a"], 1) == {"a"}


CLAIM = """
import sys, os
from lswag_fast.store import Store
store = Store(sys.argv[1])
with store.owner() as owner:
    print(store.claim(owner, ["a"], 1), flush=True)
    sys.stdin.read(1)
    os._exit(1)
"""


def test_claim_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "{'a'}\n"
    with Store(path) as store, store.owner() as owner:
        assert store.claim(owner, ["a"], 1) == set()
        process.communicate("x")
        assert store.claim(owner, ["a"], 1) == {"a"}


def test_process_id_given_out_again_is_another_owner(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as store, store.owner() as owner:
        parent = os.getppid()
        row = ("a", "someone", store_module._host(), parent, store_module._born(parent) - 1, time.time())
        store._connection.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?, ?)", row)
        assert store.claim(owner, ["a"], 1) == {"a"}


@pytest.mark.parametrize(("silent", "free"), [(0.0, set()), (store_module.REMOTE_CLAIM_SECONDS + 1, {"a"})])
def test_claim_from_another_machine_expires_without_a_sign_of_life(silent: float, free: set[str]) -> None:
    with Store(None) as store, store.owner() as owner:
        row = ("a", "someone", "elsewhere", 1, 1, time.time() - silent)
        store._connection.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?, ?)", row)
        assert store.claim(owner, ["a"], 1) == free


def test_records_are_durable_and_the_log_is_written_ahead(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as store:
        assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        statements: list[str] = []
        store._connection.set_trace_callback(statements.append)
        filled(store, record("a"))
    assert [s for s in statements if "synchronous" in s or s == "COMMIT"][-2:] == [
        "PRAGMA synchronous = FULL",
        "COMMIT",
    ]


def test_store_of_a_newer_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with Store(path) as store:
        store._connection.execute("PRAGMA user_version = 99")
    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"version 99, written by a newer lswag_fast.*upgrade"):
            Store(path, read_only=read_only)


def test_other_files_are_no_stores(tmp_path: Path) -> None:
    foreign, text = tmp_path / "foreign.db", tmp_path / "text.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    text.write_text("not a database, " * 100)
    with pytest.raises(StoreError, match="no score store"):
        Store(foreign)
    with pytest.raises(StoreError, match="not a score store"):
        Store(text)
    with pytest.raises(StoreError, match=r"is a folder; pass a file"):
        Store(tmp_path)
    with pytest.raises(StoreError, match="there is no store"):
        Store(tmp_path / "absent.db", read_only=True)
    with pytest.raises(StoreError, match="folder must exist"):
        Store(tmp_path / "absent" / "s.db")


def test_read_only_folder_is_readable_and_says_so_when_written() -> None:
    with TemporaryDirectory() as name:
        check_read_only(Path(name))


def check_read_only(folder: Path) -> None:
    with Store(folder / "s.db") as store:
        filled(store, record("a"))
    shutil.copy(folder / "s.db", folder / "old.db")
    to_version_1(folder / "old.db")
    (folder / "s.db").chmod(0o444)
    folder.chmod(0o555)
    try:
        with as_nobody():
            with Store(folder / "s.db", read_only=True) as store:
                assert list(store.find(["a"])) == ["a"]
            with Store(folder / "old.db", read_only=True) as store:
                check_version_1(store)
            with pytest.raises(StoreError, match=r"s\.db cannot be opened .*(read-only; make both|allowed to write)"):
                Store(folder / "s.db")
            with pytest.raises(StoreError, match="allowed to write there"):
                Store(folder / "new.db")
    finally:
        folder.chmod(0o755)


def test_full_disk_loses_nothing_recorded(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with Store(path) as store:
        filled(store, *(record(str(n)) for n in range(20)))
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match=r"full.*free some disk space.*everything recorded is kept"):
            filled(store, *(record(f"more {n}") for n in range(200)))
        assert len(list(store.records())) == 20
    with Store(path) as store:
        filled(store, record("more 1"))
        assert len(list(store.records())) == 21


def test_locked_store_says_who_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_BUSY_SECONDS", 0.05)
    with Store(tmp_path / "s.db") as first, Store(tmp_path / "s.db") as second:
        first._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another program has kept it locked"):
            second.begin_run("c", {})


def test_network_file_systems_are_told_from_local_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/sda / ext4 rw 0 0\nhost:/x {tmp_path}/net nfs4 rw 0 0\n/dev/sdb {tmp_path}/net/local xfs rw 0 0\n"
    )
    assert network_file_system(tmp_path / "s.db", mounts) is None
    assert network_file_system(tmp_path / "net" / "s.db", mounts) == "nfs4"
    assert network_file_system(tmp_path / "net" / "local" / "s.db", mounts) is None
    assert network_file_system(tmp_path, tmp_path / "absent") is None
    monkeypatch.setattr(store_module, "network_file_system", lambda path: "nfs4")
    with pytest.warns(UserWarning, match=r"network file system \(nfs4\)"):
        Store(tmp_path / "s.db").close()


def test_a_record_bears_the_time_of_its_commit() -> None:
    with Store(None) as store:
        before = time.time()
        row = Row.of(record("a"), store.begin_run("c", {}))
        with store.owner() as owner:
            (committed,) = store.commit(owner, [row])
        assert before <= committed.recorded <= time.time()
        assert store.find(["a"])["a"] == replace(committed, reused=True)
