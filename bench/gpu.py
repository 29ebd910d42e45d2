"""Everything that only a GPU can show, in one command of at most eight minutes: `make bench-gpu`.

In this order, each in a process of its own and each written as it comes: correctness on the device, the whole score,
the kernels, the peers. A step that fails or runs out of time is recorded with its reason, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import measure
import per_sample_gradients
import torch
import torch.nn.functional as F
from original_autoformer import original_candidate
from torch import Tensor

from lswag_fast import images, spaces
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.options import ScoreOptions

ROOT = Path(__file__).resolve().parents[1]
BUDGET = {"correctness": 200, "score": 110, "kernels": 90, "peers": 60}
"""Seconds a step may take."""
MIDDLE = {
    name: {
        "embed_dim": embed,
        "depth": depth,
        "num_heads": [heads[layer % len(heads)] for layer in range(depth)],
        "mlp_ratio": [ratios[layer % len(ratios)] for layer in range(depth)],
    }
    for name, embed, depth, heads, ratios in (
        ("autoformer-tiny", 216, 13, (3, 4), (3.5, 4.0)),
        ("autoformer-small", 384, 13, (5, 6, 7), (3.0, 3.5, 4.0)),
        ("autoformer-base", 576, 15, (9, 10), (3.0, 3.5, 4.0)),
    )
}
"""The middle candidate of each space."""
ROUNDS = 20
PRODUCT = 8192
COPY_BYTES = 2**32


def run(steps: Sequence[str]) -> int:
    """Runs the steps and returns how many failed."""
    results: dict[str, Any] = {"machine": measure.machine("cuda"), "steps": {}}
    path = measure.write("cuda", "kernels", results)
    failed = 0
    for step in steps:
        print(f"== {step}", flush=True)
        started = time.monotonic()
        outcome = _correctness() if step == "correctness" else _in_process(step)
        outcome["seconds"] = time.monotonic() - started
        failed += not outcome["ok"]
        results["steps"][step] = outcome
        path = measure.write("cuda", "kernels", results)
        print(f"== {step}: {'ok' if outcome['ok'] else 'FAILED'} after {outcome['seconds']:.0f} s", flush=True)
    print(path)
    return failed


def _correctness() -> dict[str, Any]:
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*on_device.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *tests]
    found = _attempt(command, BUDGET["correctness"])
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        found["memory_checker"] = "not run: compute-sanitizer is not installed"
        return found
    command = [checker, "--error-exitcode", "9", *command, "-k", "checked"]
    checked = _attempt(command, 120)
    return {**found, "ok": found["ok"] and checked["ok"], "memory_checker": checked}


def _in_process(step: str) -> dict[str, Any]:
    found = _attempt([sys.executable, __file__, "--step", step], BUDGET[step])
    lines = [line for line in found["output"] if line.startswith("{")]
    return {**found, "output": found["output"] if not found["ok"] else [], **(json.loads(lines[-1]) if lines else {})}


def _attempt(command: Sequence[str], seconds: float) -> dict[str, Any]:
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return {"ok": False, "why": f"stopped after {seconds} s", "output": text.splitlines()[-20:]}
    lines = (process.stdout + process.stderr).splitlines()
    print("\n".join(line for line in lines[-25:] if not line.startswith("{")), flush=True)
    return {"ok": process.returncode == 0, "output": lines[-25:]}


def timed(call: Callable[[], Any], rounds: int = ROUNDS) -> dict[str, float]:
    """Returns the median seconds of a call on the device, and of its launch on the host."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    host = []
    for start, end in events:
        torch.cuda.synchronize()
        start.record()
        began = time.perf_counter()
        call()
        host.append(time.perf_counter() - began)
        end.record()
    torch.cuda.synchronize()
    return {"seconds": median(a.elapsed_time(b) for a, b in events) / 1e3, "host_seconds": median(host)}


def rates() -> dict[str, float]:
    """Returns what this GPU does at most: bytes a second of a copy (read and written), bf16 FLOP a second."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * COPY_BYTES / timed(lambda: target.copy_(source))["seconds"]
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * PRODUCT**3 / timed(lambda: a @ b)["seconds"]
    return {"copy_bytes_per_second": copy, "bfloat16_flops_per_second": product}


def score_step() -> dict[str, Any]:
    """Returns how fast whole scores are beside plain passes, and how they rank."""
    found: dict[str, Any] = {"rates": rates()}
    for name in MIDDLE:
        subject = Subject(name, samples=64)
        row = {
            "score": timed(subject.score),
            **{f"plain pass, {how}": timed(call) for how, call in subject.plain_passes().items()},
        }
        row["candidates_a_minute"] = 60 / max(row["score"].values())
        row["floor_seconds"] = subject.floor(found["rates"])
        found[name] = row
        print(name, json.dumps(measure.rounded(row)), flush=True)
    found["ranking"] = ranking()
    return found


def ranking() -> dict[str, Any]:
    """Returns how the 200 fixed candidates rank against their float64 scores."""
    import float64_ranking as fixed
    from rank_statistics import kendall_tau

    _, lines = fixed.read_scores()
    data, net = fixed.batch(), fixed.supernet()
    found = {}
    for dtype in ("float32", "bfloat16"):
        options = ScoreOptions(dtype=dtype, device="cuda").resolved(len(data.images))
        engine = AutoFormerEngine(net, data.images, data.labels, None, options)
        results = [engine.score(line["arch"]) for line in lines]
        scores, exact = [r.lswag for r in results], [line["lswag"] for line in lines]
        strata = {
            str(key): kendall_tau([exact[i] for i in rows], [scores[i] for i in rows])
            for key, rows in fixed.strata([line["arch"] for line in lines]).items()
        }
        found[dtype] = {
            "tau": kendall_tau(exact, scores),
            "tau_of_lowest_stratum": min(strata.values()),
            "largest_error_of_a_log_term": max(map(fixed.log_term_error, results, lines)),
            "same_bits_again": [engine.score(line["arch"]).lswag for line in lines[:20]] == scores[:20],
        }
    return found


class Subject:
    """The middle candidate of a space, its supernet and Gaussian images, on the GPU."""

    def __init__(self, name: str, samples: int) -> None:
        self.space = spaces.get(name, image_size=224, patch_size=16, num_classes=1000)
        self.arch = self.space.canonical(MIDDLE[name])
        self.samples = samples
        data = images.load("noise", samples, image_size=224, seed=0)
        options = ScoreOptions(dtype="bfloat16", device="cuda").resolved(samples)
        self.supernet = self.space.supernet(seed=0)
        self.engine = AutoFormerEngine(self.supernet, data.images, data.labels, None, options)
        self.images, self.labels = data.images.cuda().bfloat16(), data.labels.cuda()

    def score(self) -> Any:
        return self.engine.score(self.arch)

    def plain_passes(self) -> dict[str, Callable[[], None]]:
        """Returns plain bfloat16 forward and backward passes, to every parameter."""
        own = self.space.build(self.arch, supernet=self.supernet).to("cuda", torch.bfloat16)
        published = original_candidate(self.space, self.arch, self.supernet.subnet(self.arch).state_dict())
        passes = {"published formulation": published.to("cuda", torch.bfloat16), "space.build": own}
        return {how: partial(_plain_pass, model, self.images, self.labels) for how, model in passes.items()}

    def floor(self, rates: dict[str, float]) -> float:
        """Returns the seconds of the multiplications alone: one forward and backward pass."""
        return 6 * self.space.macs(self.arch) * self.samples / rates["bfloat16_flops_per_second"]


def _plain_pass(model: torch.nn.Module, pictures: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(pictures).float(), labels).backward()
    model.zero_grad(set_to_none=True)


def peers_step() -> dict[str, Any]:
    """Returns the time of Lambda by torch.func's vmap over whole per-sample gradients, and who is missing."""
    found: dict[str, Any] = {"not_measured": {}}
    for package in ("opacus", "backpack"):
        if find_spec(package) is None:
            found["not_measured"][package] = "not installed here"
    for name in ("autoformer-tiny", "autoformer-small"):
        subject = Subject(name, samples=16)
        published = original_candidate(subject.space, subject.arch, subject.supernet.subnet(subject.arch).state_dict())
        model = per_sample_gradients.with_plain_modules(published.to("cuda", torch.bfloat16))
        found[name] = {"samples": 16, "score": timed(subject.score, 10)}
        for how in ("torch_func", "loop", *(p for p in ("opacus", "backpack") if p not in found["not_measured"])):
            call = getattr(per_sample_gradients, how)(model, subject.images, subject.labels)
            try:
                found[name][how] = timed(call, 3)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                found["not_measured"][f"{how}, {name}"] = str(error).splitlines()[0]
        print(name, json.dumps(measure.rounded(found[name])), flush=True)
    return found


STEPS: dict[str, Callable[[], dict[str, Any]]] = {"score": score_step, "kernels": kernels_step, "peers": peers_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=STEPS, help="run this step in this process and print it as JSON")
    parser.add_argument("--only", choices=("correctness", *STEPS), action="append", help="run only these steps")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("make bench-gpu measures a CUDA device, and torch finds none here")
    if arguments.step:
        warnings.simplefilter("ignore")
        print(json.dumps(measure.rounded(STEPS[arguments.step]())))
        return
    sys.exit(1 if run(arguments.only or ("correctness", *STEPS)) else 0)


if __name__ == "__main__":
    main()
