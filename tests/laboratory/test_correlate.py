from __future__ import annotations

import base64
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from lswag_fast import cli, spaces

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Runs `lswag-fast correlate` in an empty folder; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lswag-fast", "correlate", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    yield command
    torch.set_num_threads(threads)


def table(path: str, rows: int = 40) -> None:
    """A table in which zico follows the accuracy, flops somewhat, and flat and none not at all."""
    generator = np.random.default_rng(0)
    with Path(path).open("w", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(["arch", "val_accuracy", "zico", "flops", "flat", "<i>&"])
        for place in range(rows):
            noise = generator.normal(size=3)
            sheet.writerow([f"({place}, 1)", 70 + place, place + noise[0], place + 9 * noise[1], 1, noise[2]])


class Page(HTMLParser):
    """The attributes of a page's elements, by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def test_a_table_becomes_a_report_with_figures_and_numbers(run: Run):
    table("toy.csv")
    code, out, err = run("toy.csv", "--draws", "50", "--top", "5", "--output", "deep/report")
    assert (code, err) == (0, "")
    assert "toy: 40 architectures, precision at the top 5" in out
    assert re.search(r"zico +0\.99\d +\[0\.\d\d, 1\.00\]", out)
    assert "Warning: flat is 1 for every architecture" in out
    names = {path.name for path in Path("deep/report").iterdir()}
    assert names == {
        *("report.html", "correlations.json", "correlations.csv", "heat-map.png", "bars.png", "scatter-1-toy.png")
    }
    (task,) = json.loads(Path("deep/report/correlations.json").read_text())["tasks"]
    rows = list(csv.DictReader(Path("deep/report/correlations.csv").read_text().splitlines()))
    assert [row["proxy"] for row in rows] == [row["proxy"] for row in task["proxies"]]
    assert float(rows[0]["spearman"]) == task["proxies"][0]["spearman"]
    assert all(Path("deep/report", n).read_bytes()[:4] == b"\x89PNG" for n in names if n.endswith(".png"))


def test_the_report_needs_nothing_from_elsewhere(run: Run):
    table("toy.csv")
    run("toy.csv", "--draws", "20", "--output", "r")
    page = Path("r/report.html").read_text()
    found = Page(page).found
    sources = [values["src"] or "" for tag, values in found if tag == "img"]
    assert len(sources) == 3
    assert all(base64.b64decode(src.removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG" for src in sources)
    assert not [tag for tag, values in found if tag in ("link", "iframe") or (tag == "script" and "src" in values)]
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "<i>" not in page
    assert "&lt;i&gt;&amp;" in page
    assert "40 architectures" in page
    assert '<td data-value="" class="state">constant</td>' in page


def test_scores_and_accuracies_in_two_files(run: Run):
    table("toy.csv")
    lines = [json.dumps({"arch": f"({place}, 1)", "c10": 10 * place}) for place in range(2, 44)]
    Path("trained.jsonl").write_text("\n".join(lines))
    code, out, _ = run("toy.csv", "--accuracies", "trained.jsonl", "--draws", "20", "--json", "--proxies", "zico")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(row["task"], row["proxy"]) for row in rows] == [("c10", "zico"), ("c10", "flops")]
    assert rows[0]["architectures"] == 38
    assert "38 architectures have scores and a row of accuracies" in Path("correlations/report.html").read_text()


def test_repeats_score_with_several_seeds_and_go_on_where_they_stopped(run: Run):
    space = spaces.get("autoformer-tiny", image_size=32, num_classes=10)
    archs = list(space.sample(11, seed=3))
    lines = [json.dumps({"arch": arch, "c100_acc": 70 + place}) for place, arch in enumerate(archs)]
    Path("trained.jsonl").write_text("\n".join([*lines, '{"arch": {"depth": 3}, "c100_acc": 1}']))
    sizes = ("--image-size", "32", "--num-classes", "10", "--samples", "4", "--images", "noise", "--device", "cpu")
    command = ("s.db", "--accuracies", "trained.jsonl", *sizes, "--dtype", "float32", "--draws", "20", "--json")
    code, out, _ = run(*command, "--repeats", "2")
    rows = {row["proxy"]: row for row in map(json.loads, out.splitlines())}
    assert code == 0
    assert {"lswag", "lambda", "psi", "parameters", "sum_log_numel"} <= rows.keys()
    assert rows["lswag"]["architectures"] == 11
    by_repeat = rows["lswag"]["spearman_by_repeat"]
    assert len(by_repeat) == 2
    assert rows["lswag"]["spearman"] == pytest.approx(np.mean(by_repeat))
    assert rows["lswag"]["spearman_spread"] == pytest.approx(np.std(by_repeat, ddof=1))
    assert run(*command, "--repeats", "2")[1] == out
    assert run(*command)[1] == out
    once = [json.loads(line) for line in run(*command, "--repeats", "1", "--seed", "1")[1].splitlines()]
    assert next(row for row in once if row["proxy"] == "lswag")["spearman"] == by_repeat[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.csv",), "there is no file absent.csv"),
        (("few.csv",), "few: 9 architectures have both scores and an accuracy"),
        (("toy.csv", "--tasks", "speed"), "toy has no column of accuracies (speed)"),
        (("toy.csv", "--proxies", "nwot"), "no table holds a proxy called nwot"),
        (("toy.csv", "--top", "40"), "the top must be 1 to 39"),
        (("toy.csv", "--accuracies", "other.csv"), "toy and other have 0 architectures in common"),
        (("s.db", "--repeats", "2"), "--repeats scores the architectures of --accuracies into one store"),
        (("s.db", "--repeats", "2", "--accuracies", "toy.csv"), "no architecture of the accuracies is in autoformer"),
        (("s.db", "--repeats", "2", "--accuracies", "vit.jsonl"), "of 1 architectures of the space, and 10 are needed"),
        (("toy.csv", "--output", "toy.csv"), "choose another --output"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, arguments: tuple[str, ...], message: str):
    table("toy.csv")
    table("few.csv", rows=9)
    Path("other.csv").write_text("arch,acc\n" + "".join(f"x{place},{place}\n" for place in range(12)))
    arch = next(spaces.get("autoformer-tiny").sample(1))
    Path("vit.jsonl").write_text(json.dumps({"arch": arch, "acc": 70}))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lswag-fast: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_store_needs_accuracies(run: Run):
    from lswag_fast.store import Store

    Store("s.db").close()
    assert "is a score store, which holds no accuracies" in run("s.db")[2]


def test_without_matplotlib_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch):
    table("toy.csv")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("toy.csv")
    assert code == 2
    assert "pip install 'lswag-fast[lab]'" in err


def test_a_proxy_that_nothing_can_be_said_of_still_has_a_report(run: Run):
    rows = "".join(f"a{place},{place},1,\n" for place in range(12))
    Path("flat.csv").write_text("arch,acc,flat,empty\n" + rows)
    code, out, _ = run("flat.csv", "--draws", "20")
    assert code == 0
    assert re.search(r"flat +constant", out)
    assert re.search(r"empty +missing", out)
    assert len([tag for tag, _ in Page(Path("correlations/report.html").read_text()).found if tag == "img"]) == 2
