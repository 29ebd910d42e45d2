"""Everything of `make bench-gpu` but the kernels' results, without a GPU: `make rehearse-gpu`.

Beneath a CUDA build of PyTorch and the package's CUDA build a stand-in takes the place of the CUDA runtime, cuBLAS and
the driver (stand_in/runtime.h says what of them holds). All steps of bench/gpu.py run, and what they compile beside
them, with the tests' comparisons passed over; and steps of the rehearsal's own, which hold each op, the memory of large
layers and candidates of each space to the project's rules. It fails where a step does, where a call of CUDA is illegal,
where a row could not be measured, or where a rule is broken.

Numbers, and times that a device would take, mean nothing, and stay in the output folder; a profile of the device is
empty. True are what the host does to launch and to read a candidate, up to the runtime, whose own time is missing; how
much it launches, asks for and waits; and how much memory torch reserves on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import stand_in

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 3600
"""That a step may take: the host computes what tests compare with, and compiles, on few cores."""
OWN = ("ops", "memory", "candidates")
"""Steps of the rehearsal's own, functions of rules.py."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "rehearsal-results", help="logs, and results")
    parser.add_argument("--check", action="store_true", help="only say what is missing here, if anything")
    parser.add_argument("--only", action="append", help="run only steps whose names begin so")
    parser.add_argument("--step", choices=OWN, help="run this step in this process")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    if arguments.step:
        run_step(arguments.step, output)
    if lacking := list(stand_in.missing()):
        sys.exit("a rehearsal cannot run here: " + "; ".join(lacking))
    if arguments.check:
        return
    output.mkdir(parents=True, exist_ok=True)
    library = stand_in.build(ROOT / "build" / "stand-in")
    illegal = output / "illegal.txt"
    if os.environ.get("LD_PRELOAD") != str(library):
        illegal.unlink(missing_ok=True)
        os.execve(sys.executable, [sys.executable, *sys.argv], stand_in.environment(library, illegal))
    sys.exit(rehearse(arguments.only or [""], output, illegal))


def run_step(name: str, output: Path) -> None:
    import rules
    from steps import Rows, rows_path

    rows = Rows(rows_path(output, name))
    getattr(rules, name)(rows)
    rows.end()


def rehearse(only: Sequence[str], output: Path, illegal: Path) -> str | None:
    """Runs the steps whose names begin so, prints what is true of them, and returns what went wrong."""
    import gpu
    import measure
    import steps
    from gpu_cases import MIDDLE

    def wanted(names: Iterable[str]) -> list[str]:
        return [name for name in names if name.startswith(tuple(only))]

    def write(found: dict[str, Any]) -> Path:
        path = output / "rehearsal.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        return path

    own = [sys.executable, __file__, "--output", str(output), "--step"]
    commands = {f"compile {name}": [sys.executable, gpu.__file__, "--compile", name] for name in gpu.COMPILED}
    commands |= {name: [*own, name] for name in OWN}
    cache = {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton")}
    given = [steps.Step(name, SECONDS, commands[name], environment=cache) for name in wanted(commands)]
    results: dict[str, Any] = {"steps": {}}
    steps.run(given, output, results, write)
    if names := wanted(gpu.BUDGET):
        measure.RESULTS = output / "of-no-device"
        gpu.BUDGET = dict.fromkeys(gpu.BUDGET, SECONDS)
        gpu.run_all(names, output)
        results["steps"] |= json.loads(measure.results_path("cuda", "kernels").read_text())["steps"]
        write(results)
    found = results["steps"].get("candidates", {})
    if candidates := {name: found[name] for name in MIDDLE if name in found}:
        how = "make rehearse-gpu: no device, and nothing of the CUDA runtime's own time"
        path = output / measure.results_path("cpu", "host-launch").name
        path.write_text(json.dumps({"machine": measure.machine("cuda"), "how": how, **candidates}, indent=1) + "\n")
        print(*table(candidates), sep="\n")
    wrong = [f"{name} failed: see its log in {output}" for name, step in results["steps"].items() if not step["ok"]]
    wrong += [f"illegal: {line}" for line in (illegal.read_text().splitlines() if illegal.exists() else [])]
    return "\n".join([*wrong, *unmeasured(results["steps"])]) or None


def unmeasured(found: Any, *names: str) -> Iterator[str]:
    """Yields the rows that hold a reason in place of what was to be measured, but for a package that is missing."""
    if isinstance(found, dict):
        for name, value in found.items():
            yield from unmeasured(value, *names, name)
    elif re.match(r"(failed|not measured|not run)(?!.*No module named)", str(found)):
        yield f"{', '.join(names)}: {found}"


def table(candidates: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of what is true of candidates without a device."""
    heads = ("launch ms", "finish ms", "launches", "graphs", "waits", "mallocs", "GiB", "two in flight")
    yield f"{'a candidate, S = 64, bfloat16':<42}" + "".join(f"{head:>15}" for head in heads)
    for name, ways in candidates.items():
        for how, row in ways.items():
            if isinstance(row, str):
                yield f"{name + ', ' + how:<42} {row}"
                continue
            milliseconds = [f"{row[f'{part}_milliseconds']:.2f}" for part in ("launch", "finish")]
            counts = [row["launches"], row["graph_launches"], row["waits"]]
            counts.append(row["device_allocations"] + row["host_allocations"])
            memory = [f"{value / 2**30:.2f}" for value in row["bytes_reserved"].values()]
            cells = [*milliseconds, *(f"{count:g}" for count in counts), *memory]
            yield f"{name + ', ' + how:<42}" + "".join(f"{cell:>15}" for cell in cells)


if __name__ == "__main__":
    main()
