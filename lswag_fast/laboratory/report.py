"""A study as one HTML page that needs nothing else: figures inside, tables that sort, in light and dark."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from .study import Estimate, Row, TaskStudy

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f23; --paper: #ffffff; --soft: #f1f3f6; --line: #d4d8de; --mark: #a14a00;
  --muted: #5b626d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16181c; --soft: #22262c; --line: #3a404a;
  --mark: #ffb066; --muted: #a2aab6; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 1.5rem; max-width: 76rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-top: 1px solid var(--line);
  padding-top: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; white-space: nowrap; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--soft); }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td small { color: var(--muted); display: block; font-size: 11.5px; }
.state { color: var(--mark); } .warnings li { color: var(--mark); } .warnings b { color: var(--ink); }
figure { margin: 1rem 0; }
.muted { color: var(--muted); }
img { max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); border-radius: 4px; }
"""
_SCATTER = "Accuracy against the ranking by each of the best proxies; the lowest hundredth of accuracies is not drawn"
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, place = head.cellIndex, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") === "descending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[place].dataset.value;
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? difference : -difference;
  };
  body.append(...[...body.rows].sort(order));
});
"""
_COLUMNS = {
    "proxy": "",
    "Spearman's rho": "rank correlation with the accuracies",
    "Kendall's tau-b": "concordant less discordant pairs",
    "precision at top": "part of the k best by the proxy that is among the k best by accuracy",
    "regret": "best accuracy less that of the proxy's best pick",
    "partial rho": "Spearman's rho given the counts",
    "nearest count": "the count that ranks most like the proxy, and their rho",
    "architectures": "with a value",
}


def page(studies: Sequence[TaskStudy], figures: Mapping[str, bytes], scatters: Sequence[bytes]) -> str:
    """Returns the report as HTML.

    Args:
        studies: one a task.
        figures: PNG data by its caption, for all tasks together.
        scatters: PNG data of each task, empty where it has no figure.
    """
    sections = [_section(study, scatter) for study, scatter in zip(studies, scatters, strict=True)]
    overview = [f"<h2>All tasks</h2>{''.join(_figure(png, caption) for caption, png in figures.items())}"]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><title>Which proxy ranks which task</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_STYLE}</style></head><body>",
            "<h1>Which proxy ranks which task</h1>",
            _introduction(studies),
            *overview,
            *sections,
            f"<script>{_SCRIPT}</script></body></html>",
            "",
        ]
    )


def _introduction(studies: Sequence[TaskStudy]) -> str:
    names = "; ".join(f"{s.task.name}: {s.architectures} architectures" for s in studies)
    draws = " or ".join(str(n) for n in sorted({s.draws for s in studies}))
    repeats = max(s.repeats for s in studies)
    text = [
        f"{len(studies)} task{'s' * (len(studies) > 1)} ({names}). A higher value of a proxy is taken as better; where "
        "rho is negative the proxy is best turned round, and its precision and regret are those of the unturned one.",
        f"Intervals, in brackets, hold 95 % of the values over {draws} resamples of the architectures: they say how "
        "much a number would move with other architectures of the same kind, and nothing about other seeds.",
        "Partial rho is what a proxy knows beyond counting parameters, multiply-adds and the like: the correlation of "
        "what is left of both rankings when those of the counts are taken away. Near 0, the counts rank as well.",
    ]
    if repeats > 1:
        text.append(
            f"Numbers are means over {repeats} repeats, each with weights, images and labels of its own seed; ± is the "
            "standard deviation over them."
        )
    credit = f'<p class="muted">lswag_fast {html.escape(__version__)}</p>'
    return "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in text) + credit


def _section(study: TaskStudy, scatter: bytes) -> str:
    name = html.escape(study.task.name)
    chance = study.top / study.architectures
    lead = (
        f"{study.architectures} architectures, accuracies from {study.task.accuracy.min():.4g} to "
        f"{study.task.accuracy.max():.4g}. Precision is at the top {study.top}, where chance gives {chance:.2f}."
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in study.task.notes)
    warnings = "".join(
        f"<li><b>{html.escape(row.proxy)}</b> {html.escape(warning)}</li>"
        for row in study.rows
        for warning in row.warnings
    )
    return "".join(
        [
            f"<h2>{name}</h2><p>{html.escape(lead)}</p>",
            f"<ul>{notes}</ul>" if notes else "",
            _table(study),
            f'<ul class="warnings">{warnings}</ul>' if warnings else "",
            _figure(scatter, _SCATTER),
        ]
    )


def _table(study: TaskStudy) -> str:
    heads = "".join(
        f'<th scope="col" title="{html.escape(text)}"><button>{html.escape(name)}</button></th>'
        for name, text in _COLUMNS.items()
    )
    rows = "".join(f"<tr>{_cells(row)}</tr>" for row in study.rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cells(row: Row) -> str:
    mark = " <small>count</small>" if row.is_count else ""
    first = f'<td data-value="{html.escape(row.proxy)}">{html.escape(row.proxy)}{mark}</td>'
    architectures = f'<td data-value="{row.architectures}">{row.architectures}</td>'
    if not row.estimates:
        empty = '<td data-value=""></td>' * (len(_COLUMNS) - 3)
        return f'{first}<td data-value="" class="state">{row.status}</td>{empty}{architectures}'
    found = row.estimates
    numbers = "".join(_number(found.get(name)) for name in ("spearman", "kendall", "precision", "regret", "partial"))
    rho = row.rho_with_count
    nearest = f"{row.closest_count} {rho:z.2f}" if row.closest_count and math.isfinite(rho) else ""
    value = f"{abs(rho):.6f}" if nearest else ""
    return f'{first}{numbers}<td data-value="{value}">{html.escape(nearest)}</td>{architectures}'


def _number(found: Estimate | None) -> str:
    if found is None or not math.isfinite(found.value):
        return '<td data-value=""></td>'
    spread = f"<br>± {found.spread:.2g}" if math.isfinite(found.spread) else ""
    interval = f"[{found.low:z.2f}, {found.high:z.2f}]{spread}"
    return f'<td data-value="{found.value:.6f}">{found.value:z.3f}<small>{interval}</small></td>'


def _figure(png: bytes, caption: str) -> str:
    if not png:
        return ""
    data = base64.b64encode(png).decode()
    said = html.escape(caption)
    return f'<figure><img alt="{said}" src="data:image/png;base64,{data}"><figcaption>{said}</figcaption></figure>'


def as_json(studies: Sequence[TaskStudy]) -> str:
    """Returns the numbers of the report as JSON."""
    tasks: list[dict[str, Any]] = [
        {
            "task": study.task.name,
            "architectures": study.architectures,
            "top": study.top,
            "draws": study.draws,
            "repeats": study.repeats,
            "counts": list(study.task.counts),
            "notes": list(study.task.notes),
            "proxies": [row.flat() for row in study.rows],
        }
        for study in studies
    ]
    return json.dumps({"lswag_fast": __version__, "tasks": tasks}, indent=1) + "\n"
