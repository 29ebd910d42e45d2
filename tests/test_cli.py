from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lswag_fast import cli, spaces
from lswag_fast.backends import backends
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.errors import ScoreError
from lswag_fast.store import Store

SIZES = ("--image-size", "32", "--num-classes", "10", "--samples", "4", "--images", "noise", "--device", "cpu")
SCORE = ("score", *SIZES, "--dtype", "float32", "--threads", "1")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Runs a command line in an empty folder; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lswag-fast", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    yield command
    torch.set_num_threads(threads)


def archs(n: int) -> list[str]:
    space = spaces.get("autoformer-tiny", image_size=32, num_classes=10)
    return [space.encode(arch) for arch in space.sample(n, seed=7)]


def test_score_ranks_and_a_second_run_finds_everything_done(run: Run) -> None:
    code, out, err = run(*SCORE, "--count", "3", "--store", "s.db", "--top", "2")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if "embed_dim=" in line]
    assert [row[0] for row in rows] == ["1", "2"]
    assert float(rows[0][1]) >= float(rows[1][1])
    assert "3 candidates: 3 scored, 0 found done, 0 failed (cpu, float32, S = 4, G = 4); store s.db" in out
    code, again, _ = run(*SCORE, "--count", "3", "--store", "s.db", "--top", "2")
    assert code == 0
    assert "0 scored, 3 found done" in again
    assert again.replace("0 scored, 3 found", "3 scored, 0 found") == out


def test_warning_is_said_once(run: Run) -> None:
    _, out, err = run(*SCORE, "--count", "3", "--samples", "2")
    assert (out + err).count("Psi is at") == 1
    assert "Warning (3 of 3 candidates)" in out


def test_warnings_that_name_different_layers_are_one_line_of_readable_length(run: Run) -> None:
    cells = ["(2, 2, 1, 1, 1, 2)", "(1, 2, 2, 1, 2, 0)", "(2, 1, 1, 1, 1, 0)"]  # with convolutions that lead nowhere
    Path("a.txt").write_text("\n".join(cells))
    _, out, _ = run("score", "--space", "nasbench201", "--archs", "a.txt", "--image-size", "8", *SIZES[2:])
    dead = [line for line in out.splitlines() if "layers of dead weights alone" in line]
    assert len(dead) == 1
    assert dead[0].startswith("Warning (3 of 3 candidates): layers of dead weights alone, which add nothing: cells.0.")
    assert dead[0].endswith(" ...")
    assert len(dead[0]) < 280


def test_json_is_one_object_a_record_and_nothing_else(run: Run) -> None:
    code, out, _ = run(*SCORE, "--count", "2", "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [r["status"] for r in records] == ["ok", "ok"]
    assert records[0]["lswag"] == pytest.approx(records[0]["trainability"] * records[0]["expressivity"])
    code, best, _ = run("top", "--store", "scores.db", "-n", "1", "--json")
    assert json.loads(best)["lswag"] == max(r["lswag"] for r in records)


def test_bad_lines_are_told_by_number_and_the_rest_runs(run: Run) -> None:
    good = archs(2)
    lines = [good[0], "{not json", "", '{"embed_dim": 1}', good[0].replace('"depth":', '"depht":'), good[1]]
    outside = json.loads(good[1])
    outside["embed_dim"] = 7
    Path("a.jsonl").write_text("\n".join([*lines, json.dumps(outside)]) + "\n")
    code, out, err = run(*SCORE, "--archs", "a.jsonl", "--store", "s.db")
    assert code == 1
    assert [line.split(":")[0] for line in err.splitlines()] == [f"a.jsonl, line {n}" for n in (2, 4, 5, 7)]
    assert "depht" in err
    assert "embed_dim of autoformer-tiny must be one of 192, 216, 240, got 7" in err
    assert "4 lines of a.jsonl could not be read." in out
    assert "2 candidates: 2 scored" in out


def test_count_limits_an_arch_file(run: Run) -> None:
    Path("a.jsonl").write_text("\n".join(archs(3)))
    code, out, _ = run(*SCORE, "--archs", "a.jsonl", "--count", "1")
    assert code == 0
    assert "1 candidates: 1 scored" in out


def test_failed_candidate_makes_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ScoreError("the loss of sample 3 is NaN")

    with monkeypatch.context() as broken:
        broken.setattr(AutoFormerEngine, "score", failing)
        code, out, _ = run(*SCORE, "--count", "2", "--store", "s.db")
    assert code == 1
    assert out.count("ScoreError: the loss of sample 3 is NaN") == 2
    assert "2 failed" in out
    assert run(*SCORE, "--count", "2", "--store", "s.db")[0] == 1
    assert run("top", "--store", "s.db")[0] == 0
    code, out, _ = run(*SCORE, "--count", "2", "--store", "s.db", "--retry-failed")
    assert code == 0
    assert "2 scored, 0 found done, 0 failed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "--space", "resnet"), "no search space is called 'resnet'"),
        (("score", "--images", "absent"), "there is no folder 'absent'"),
        ((*SCORE, "--groups", "3"), "groups must be 2 or more and divide S = 4 (2, 4), got 3"),
        ((*SCORE, "--samples", "1"), "a score needs 2 to 1024 images"),
        ((*SCORE, "--samples", "0"), "samples must be 1 or more, got 0"),
        ((*SCORE, "--archs", "absent.jsonl"), "there is no arch file absent.jsonl"),
        ((*SCORE, "--device", "tpu"), "device must be auto or one of"),
        ((*SCORE, "--dtype", "int8"), "dtype must be one of"),
        ((*SCORE, "--pooling", "mean"), "pooling must be one of"),
        ((*SCORE, "--window", "90", "10"), "window is (first, last)"),
        ((*SCORE, "--store", "absent/s.db"), "its folder must exist"),
        (("top", "--store", "absent.db"), "there is no store absent.db"),
        (("export", "--store", "absent.db", "--output", "o.csv"), "there is no store absent.db"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lswag-fast: ")
    assert err.count("\n") == 1
    assert message in err


def test_newer_store_is_told(run: Run) -> None:
    with Store("s.db") as store:
        store._connection.execute("PRAGMA user_version = 99")
    for command in ((*SCORE, "--store", "s.db"), ("top", "--store", "s.db")):
        code, _, err = run(*command)
        assert code == 2
        assert "written by a newer lswag_fast" in err


def test_top_keeps_settings_apart(run: Run) -> None:
    run(*SCORE, "--count", "1", "--store", "s.db", "--seed", "1")
    run(*SCORE, "--count", "2", "--store", "s.db", "--seed", "2")
    _, out, _ = run("top", "--store", "s.db")
    contexts = [line.split()[0] for line in out.splitlines() if "seed=" in line]
    assert len(contexts) == 2
    assert out.count("embed_dim=") == 2
    assert run("top", "--store", "s.db", "--context", contexts[0])[1].count("embed_dim=") == 1
    assert run("top", "--store", "s.db", "--context", "nothing")[0] == 2


def test_export_explains_itself_in_every_format(run: Run) -> None:
    run(*SCORE, "--count", "2", "--store", "s.db")
    with Store("s.db", read_only=True) as store:
        records = list(store.records())
    for form in ("csv", "jsonl"):
        assert run("export", "--store", "s.db", "--format", form, "--output", f"o.{form}")[0] == 0
    rows = list(csv.DictReader(io.StringIO(Path("o.csv").read_text())))
    objects = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [float(row["lswag"]) for row in rows] == [r.lswag for r in records] == [o["lswag"] for o in objects]
    assert [json.loads(row["arch"]) for row in rows] == [r.arch for r in records] == [o["arch"] for o in objects]
    assert rows[0]["dtype"] == objects[0]["dtype"] == "float32"
    assert rows[0]["groups"] == "4"
    assert rows[0]["notes"] == '{"images": "noise, seed 0"}'
    assert len(objects[0]["layers"]) == len(records[0].layers) > 40
    assert sorted(os.listdir()) == ["o.csv", "o.jsonl", "s.db"]


def test_export_joins_settings_with_and_without_other_proxies(run: Run) -> None:
    run(*SCORE, "--count", "1", "--store", "s.db")
    run(*SCORE, "--count", "1", "--store", "s.db", "--proxies", "nwot,params")
    with Store("s.db") as store:
        assert ["proxies" in kept.metadata["options"] for kept in store.runs()] == [False, True]
        store._connection.execute("""UPDATE records SET proxies = '{"nwot":"-Infinity"}' WHERE run = 2""")
    for form in ("csv", "jsonl"):
        assert run("export", "--store", "s.db", "--format", form, "--output", f"o.{form}")[0] == 0
    rows = list(csv.DictReader(io.StringIO(Path("o.csv").read_text())))
    assert [(row["proxy_nwot"], row["proxy_params"]) for row in rows] == [("", ""), ("-inf", "")]
    objects = [json.loads(line, parse_constant=pytest.fail) for line in Path("o.jsonl").read_text().splitlines()]
    assert [row["proxy_nwot"] for row in objects] == [None, "-Infinity"]


def test_top_says_which_settings_have_a_proxy_and_what_has_no_value(run: Run) -> None:
    for proxies in (("--proxies", "swap,params"), ("--proxies", "reg_swap"), ()):
        run(*SCORE, "--count", "1", "--store", "s.db", *proxies)
    out = run("top", "--store", "s.db")[1]
    swap, reg_swap = (
        next(line for line in out.splitlines() if f"proxies=lswag,{others} " in line)
        for others in ("params,swap", "reg_swap")
    )
    code, _, err = run("top", "--store", "s.db", "--by", "swap")
    assert code == 2
    assert f"--context {swap.split()[0]} has them" in err
    with Store("s.db") as store:
        store._connection.execute("""UPDATE records SET proxies = '{"reg_swap":null}' WHERE run = 2""")
        store._connection.commit()
    code, _, err = run("top", "--store", "s.db", "--by", "reg_swap", "--context", reg_swap.split()[0])
    assert code == 2
    assert f"reg_swap has a value for no candidate of s.db with settings {reg_swap.split()[0]}" in err


def test_top_ranks_the_lowest_first_where_lower_is_better(run: Run) -> None:
    run(*SCORE, "--count", "3", "--store", "s.db", "--proxies", "params")
    with Store("s.db") as store:
        store._connection.execute("UPDATE runs SET metadata = replace(metadata, 'params', 'te_nas_ntk')")
        store._connection.execute("UPDATE records SET proxies = replace(proxies, 'params', 'te_nas_ntk')")
    values = [
        json.loads(line)["proxies"]["te_nas_ntk"]
        for line in run("top", "--store", "s.db", "--by", "te_nas_ntk", "--json")[1].splitlines()
    ]
    assert values == sorted(values)
    assert len(set(values)) > 1
    listed = [json.loads(line) for line in run("proxies", "--json")[1].splitlines()]
    assert [row["name"] for row in listed if row["lower_is_better"]] == ["te_nas_ntk"]
    assert "lowest" in next(line for line in run("proxies")[1].splitlines() if line.startswith("te_nas_ntk"))


def test_export_to_parquet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*SCORE, "--count", "2", "--store", "s.db")
    command = ("export", "--store", "s.db", "--format", "parquet", "--output", "o.parquet")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        code, _, err = run(*command)
        assert code == 2
        assert "pip install 'lswag-fast[parquet]'" in err
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run(*command)[0] == 0
    table = parquet.read_table("o.parquet").to_pydict()
    with Store("s.db", read_only=True) as store:
        assert table["lswag"] == [r.lswag for r in store.records()]
    assert table["pattern_samples"] == [4, 4]


def test_export_of_nothing_leaves_no_file(run: Run) -> None:
    Store("s.db").close()
    code, _, err = run("export", "--store", "s.db", "--output", "o.csv")
    assert code == 2
    assert "holds no records" in err
    assert os.listdir() == ["s.db"]


def test_nasbench201_is_scored_at_its_own_sizes_in_any_spelling(run: Run) -> None:
    command = ("score", "--space", "nasbench201", "--samples", "4", "--images", "noise", "--device", "cpu")
    code, out, err = run(*command, "--count", "1", "--dtype", "float32", "--threads", "1")
    assert (code, err) == (0, "")
    assert "S = 4, G = 2" in out
    Path("cells.txt").write_text("(0, 0, 0, 0, 0, 3)\n|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|\n")
    code, out, _ = run(*command, "--archs", "cells.txt", "--threads", "1")
    assert code == 0
    assert all(f"ops={digits}" in out for digits in ("000003", "110111"))
    assert "has no option patch_size" in run(*command, "--patch-size", "4")[2]


def test_spaces_lists_every_space(run: Run) -> None:
    code, out, _ = run("spaces")
    assert code == 0
    assert all(name in out for name in spaces.names())
    listed = [json.loads(line) for line in run("spaces", "--json")[1].splitlines()]
    assert [row["name"] for row in listed] == list(spaces.names())


def test_doctor_names_what_works_and_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    for name in ("torch", "cpu", "cuda", "threads", "store", "photos", "parquet", "lab"):
        assert any(line.split()[1:2] == [name] for line in out.splitlines())
    cuda = next(b for b in backends() if b.name == "cuda")
    (line,) = (line for line in out.splitlines() if line.split()[1:2] == ["cuda"])
    assert line.startswith("ok" if cuda.available else "--")
    assert line.endswith(cuda.detail)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lswag-fast[photos]' (PIL, sklearn not installed)" in run("doctor")[1]


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    script = "import sys; from lswag_fast.cli import app; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "False False\n"


def test_interrupt_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from lswag_fast.cli import main; main()", *SCORE, "--count", "5000", "--json"]
    # A shell starts background jobs with SIGINT ignored, which children inherit; the one interrupted here must not.
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; everything finished is in scores.db" in err
    assert "Traceback" not in err
    with Store(tmp_path / "scores.db", read_only=True) as store:
        assert sum(1 for _ in store.records()) > 0


def test_bar_is_drawn_in_a_terminal_alone(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-c", "from lswag_fast.cli import main; main()", *SCORE, "--count", "2"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=slave, env=environment)
    os.close(slave)
    drawn = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            drawn += os.read(master, 4096)
        except OSError:  # the terminal closes with the program
            break
    assert process.wait() == 0
    os.close(master)
    assert b"2/2" in drawn
