"""Commands and options of `lswag-fast`; what they do is imported when they run, which keeps `--help` quick."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="lswag-fast",
    help="Scores candidate networks of a search space with L-SWAG, a zero-cost proxy.",
    epilog="Exit codes: 0 all fine; 1 a candidate failed or a line could not be read; 2 bad input; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Format(StrEnum):
    """File formats of `export`."""

    csv = "csv"
    parquet = "parquet"
    jsonl = "jsonl"


StoreOption = Annotated[Path, typer.Option("--store", help="The score store, an SQLite file on a local disk.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a record on stdout, for machines.")]


@app.command()
def score(
    space: Annotated[str, typer.Option(help="The search space; `lswag-fast spaces` lists them.")] = "autoformer-tiny",
    count: Annotated[
        int | None,
        typer.Option(min=1, help="How many candidates: 32 random ones, or all of --archs, by default."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws candidates, weights, images, crops and labels.")] = 0,
    archs: Annotated[
        Path | None,
        typer.Option(help="Candidates to score, one a line in any spelling of the space, instead of random ones."),
    ] = None,
    images: Annotated[
        str, typer.Option(help="noise; photos (crops of scikit-learn's photographs); or a folder of images.")
    ] = "photos",
    samples: Annotated[int, typer.Option(help="S, the images of the batch.")] = 64,
    groups: Annotated[
        int | None,
        typer.Option(help="G, the gradient groups; a divisor of S. S by default, 2 for nasbench201."),
    ] = None,
    store: StoreOption = Path("scores.db"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    image_size: Annotated[
        int | None,
        typer.Option(help="Height and width of the images, pixels: 224 by default, 32 for nasbench201."),
    ] = None,
    patch_size: Annotated[
        int | None,
        typer.Option(help="Height and width of a patch, pixels, in AutoFormer spaces: 16 by default."),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(help="Logits of a candidate: 1000 by default, 10 for nasbench201."),
    ] = None,
    window: Annotated[
        tuple[int, int], typer.Option(help="First and last percentile of depth that Lambda sums over.")
    ] = (0, 100),
    pooling: Annotated[str, typer.Option(help="Patterns over all activations (union), or summed by activation.")] = (
        "union"
    ),
    pattern_samples: Annotated[
        int | None,
        typer.Option(help="Count patterns over the first images only; 18 to 24 keeps Psi off its bounds."),
    ] = None,
    proxies: Annotated[
        str, typer.Option(help="Other proxies to compute too, with commas between; `lswag-fast proxies` lists them.")
    ] = "",
    top: Annotated[int, typer.Option(min=0, help="Rows of the table at the end.")] = 10,
    as_json: JsonOption = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Score failed candidates again.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads; all by default."),
    ] = None,
) -> None:
    """Scores candidates into a store; what the store holds already is not computed again."""
    from .score import Request, run

    sizes = {"image_size": image_size, "patch_size": patch_size, "num_classes": num_classes}
    request = Request(
        space=space,
        space_options={name: size for name, size in sizes.items() if size is not None},
        count=count,
        seed=seed,
        archs=archs,
        images=images,
        samples=samples,
        store=store,
        options={
            "groups": groups,
            "device": device,
            "dtype": dtype,
            "window": window,
            "pooling": pooling,
            "pattern_samples": pattern_samples,
            "proxies": ("lswag", *(name for name in proxies.replace(" ", "").split(",") if name not in ("", "lswag"))),
        },
        top=top,
        as_json=as_json,
        retry_failed=retry_failed,
        threads=threads,
    )
    raise typer.Exit(run(request))


@app.command()
def top(
    store: StoreOption = Path("scores.db"),
    n: Annotated[int, typer.Option("-n", min=1, help="Rows.")] = 10,
    context: Annotated[str, typer.Option(help="Settings to rank, by the first characters of their id.")] = "",
    by: Annotated[str, typer.Option(help="The proxy to rank by.")] = "lswag",
    as_json: JsonOption = False,
) -> None:
    """Shows the best candidates of a store: those of the newest settings, or of --context."""
    from .tables import show_top

    show_top(store, n, context, by, as_json=as_json)


@app.command()
def export(
    output: Annotated[Path, typer.Option(help="The file to write; replaced when complete.")],
    store: StoreOption = Path("scores.db"),
    format: Annotated[Format, typer.Option(help="csv and parquet leave out the layers, jsonl keeps them.")] = (
        Format.csv
    ),
) -> None:
    """Writes every record of a store to a file, with the settings that each was scored with."""
    from .export import write

    typer.echo(f"{write(store, format.value, output)} records written to {output}")


@app.command()
def spaces(as_json: JsonOption = False) -> None:
    """Lists the search spaces."""
    from .tables import show_spaces

    show_spaces(as_json=as_json)


@app.command()
def proxies(as_json: JsonOption = False) -> None:
    """Lists the proxies, and where each comes from."""
    from .tables import show_proxies

    show_proxies(as_json=as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Says which backends, extras and stores work here, and why not the others."""
    from .tables import show_checks

    raise typer.Exit(show_checks(as_json=as_json))


@app.command()
def correlate(
    scores: Annotated[
        list[Path],
        typer.Argument(help="Score stores, and tables of proxies: csv, jsonl, NAS-Bench-Suite-Zero's json."),
    ],
    accuracies: Annotated[
        list[Path] | None,
        typer.Option(help="Tables of accuracies by arch: csv, jsonl, json, Auto-Prox's pth; by default in SCORES."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Columns that are accuracies, with commas between; found by name.")] = "",
    proxies: Annotated[
        str, typer.Option(help="Proxies to study, with commas between; all by default. With --repeats, to score too.")
    ] = "",
    top: Annotated[
        int | None,
        typer.Option(min=1, help="The k of precision at the top; a tenth of the architectures by default."),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(min=20, help="Resamples for the intervals; 1000 by default, 200 beyond 2000 architectures."),
    ] = None,
    context: Annotated[str, typer.Option(help="Settings of a store, by the first characters of their id.")] = "",
    output: Annotated[Path, typer.Option(help="The folder of the report, its figures and its numbers.")] = Path(
        "correlations"
    ),
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Score the architectures of --accuracies into the store first, with so many seeds."),
    ] = None,
    space: Annotated[str, typer.Option(help="With --repeats: the search space.")] = "autoformer-tiny",
    seed: Annotated[int, typer.Option(min=0, help="With --repeats: the first seed.")] = 0,
    images: Annotated[str, typer.Option(help="With --repeats: noise, photos or a folder.")] = "photos",
    samples: Annotated[int, typer.Option(help="With --repeats: S, the images of the batch.")] = 64,
    groups: Annotated[int | None, typer.Option(help="With --repeats: G, the gradient groups; S by default.")] = None,
    device: Annotated[str, typer.Option(help="With --repeats: auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="With --repeats: auto, float32 or bfloat16.")] = "auto",
    image_size: Annotated[int | None, typer.Option(help="With --repeats: pixels; the space's own by default.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="With --repeats: logits; the space's own by default.")] = None,
    window: Annotated[tuple[int, int], typer.Option(help="With --repeats: percentiles of depth of Lambda.")] = (0, 100),
    pattern_samples: Annotated[
        int | None, typer.Option(help="With --repeats: count patterns over the first images only.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Says how well proxies rank trained networks, how sure that is, and what they know beyond counts."""
    from .correlate import Request, Scoring, run

    scoring = Scoring(
        space=space,
        space_options={"image_size": image_size, "num_classes": num_classes},
        seed=seed,
        images=images,
        samples=samples,
        options={
            "groups": groups,
            "device": device,
            "dtype": dtype,
            "window": window,
            "pattern_samples": pattern_samples,
        },
    )
    request = Request(
        scores=scores,
        accuracies=accuracies or [],
        tasks=_listed(tasks),
        proxies=_listed(proxies),
        top=top,
        draws=draws,
        context=context,
        repeats=repeats,
        scoring=scoring,
        output=output,
        as_json=as_json,
    )
    raise typer.Exit(run(request))


@app.command()
def layers(
    store: StoreOption = Path("scores.db"),
    accuracies: Annotated[
        list[Path] | None,
        typer.Option(help="Tables of accuracies by arch: .csv, .jsonl, .json, .pth (Auto-Prox)."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Columns that are accuracies, with commas between; found by name.")] = "",
    context: Annotated[str, typer.Option(help="Settings, by the first characters of their id; the newest.")] = "",
    output: Annotated[
        Path, typer.Option(help="The folder of layers.json, and of layers.png, also by number of layers.")
    ] = Path("layers"),
    as_json: JsonOption = False,
) -> None:
    """Shows where in depth gradients vary, suggests a window, and ranks every window by accuracies."""
    from .layers import Request, run

    run(Request(store, context, accuracies or [], _listed(tasks), output, as_json))


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
