"""Everything that only a GPU can show, in one command of at most eight minutes: `make bench-gpu`.

In this order, each in a process of its own and each written as it comes: correctness on the device, the whole score,
the kernels, the peers. A step that fails or runs out of time is recorded with its reason, and the next one runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from lswag_fast.ops.activation_patterns import activate_and_pack, count_patterns_device, hamming_kernel, pack_signs
from lswag_fast.ops.gelu import activation_backward
from lswag_fast.ops.gradient_moments_grouped import MomentProblem, launch_gradient_moments
from lswag_fast.ops.layer_norm import NormalisedSum
from lswag_fast.ops.relative_attention import relative_attention
from lswag_fast.options import ScoreOptions
from lswag_fast.spaces.autoformer_module import HEAD_DIM, mlp_width

ROOT = Path(__file__).resolve().parents[1]
BUDGET = {"correctness": 150, "memory checker": 40, "score": 90, "kernels": 60, "peers": 40}
"""Seconds a step may take; with the build they are eight minutes."""
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
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *tests]
    found = _attempt(command, BUDGET["correctness"])
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        found["memory_checker"] = "not run: compute-sanitizer is not installed"
        return found
    command = [checker, "--error-exitcode", "9", *command, "-k", "hamming or groups_of_samples or made_to_collide"]
    checked = _attempt(command, BUDGET["memory checker"])
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


def kernels_step() -> dict[str, Any]:
    """Returns the time of every kernel at the shapes of each middle candidate, and its share of its floor."""
    found: dict[str, Any] = {"rates": rates()}
    for name in MIDDLE:
        rows: dict[str, Any] = {}
        for case in cases(MIDDLE[name], samples=64):
            row = {**timed(rotating([case.make() for _ in range(case.sets)])), "flops": case.flops, "bytes": case.bytes}
            floor = max(
                case.flops / found["rates"]["bfloat16_flops_per_second"],
                case.bytes / found["rates"]["copy_bytes_per_second"],
            )
            rows[case.name] = {**row, "share_of_floor": floor / row["seconds"]}
            print(name, case.name, json.dumps(measure.rounded(rows[case.name])), flush=True)
        found[name] = rows
    return found


def rotating(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Returns a call of each in turn: operands that were read a moment ago would lie in the cache."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


@dataclass(frozen=True)
class Case:
    """A kernel at one shape; `make` draws operands and returns a call."""

    name: str
    make: Callable[[], Callable[[], Any]]
    flops: float
    bytes: float
    sets: int = 4


def cases(arch: Mapping[str, Any], samples: int, tokens: int = 197) -> Iterator[Case]:
    embed, heads, ratios = arch["embed_dim"], arch["num_heads"], arch["mlp_ratio"]
    rows, wide = samples * tokens, mlp_width(embed, max(ratios))
    narrow, values = rows * embed, rows * wide
    inner = HEAD_DIM * max(heads)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(samples, *shape, device="cuda", dtype=torch.bfloat16)

    def norm() -> NormalisedSum:
        weight, bias = drawn(embed)[0], drawn(embed)[0]
        return NormalisedSum.of(drawn(tokens, embed), drawn(tokens, embed), weight, bias)

    def adding_norm() -> Callable[[], Any]:
        return partial(NormalisedSum.of, drawn(tokens, embed), drawn(tokens, embed), drawn(embed)[0], drawn(embed)[0])

    def attention(*, backward: bool) -> Callable[[], Any]:
        qkv = drawn(tokens, 3 * inner).requires_grad_(backward)
        tables = [torch.randn(30, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        given = {"heads": max(heads), "grid": (14, 14)}
        call = partial(relative_attention, qkv, (tables[0], tables[1]), (tables[2], tables[3]), **given)
        if not backward:
            return call
        return partial(torch.autograd.grad, call(), qkv, drawn(tokens, inner), retain_graph=True)

    yield Case("GELU and packing", lambda: partial(activate_and_pack, drawn(tokens, wide), "gelu"), 0, values * 4.125)
    yield Case(
        "GELU backward",
        lambda: partial(activation_backward, drawn(tokens, wide), drawn(tokens, wide), "gelu"),
        0,
        values * 6,
    )
    yield Case("sum and LayerNorm", adding_norm, 0, narrow * 8)
    yield Case(
        "sum and LayerNorm, backward",
        lambda: partial(norm().backward, drawn(tokens, embed), drawn(tokens, embed)),
        0,
        narrow * 8,
    )
    products = samples * max(heads) * tokens * tokens * HEAD_DIM
    yield Case("attention", partial(attention, backward=False), 4 * products, rows * inner * 8)
    yield Case("attention, backward", partial(attention, backward=True), 10 * products, rows * inner * 16)
    for count in (16, 24, 64):
        positions = sum(tokens * mlp_width(embed, ratio) for ratio in ratios)
        yield Case(f"patterns of {count} samples", partial(_counting, arch, count, tokens), 0, positions * 8, 1)
    yield Case("Hamming kernel", partial(_counting, arch, samples, tokens, hamming=True), 0, positions * 8, 1)
    shapes = [
        shape
        for h, ratio in zip(heads, ratios, strict=True)
        for shape in (
            *((3 * HEAD_DIM * h, embed), (embed, HEAD_DIM * h)),
            *((mlp_width(embed, ratio), embed), (embed, mlp_width(embed, ratio))),
        )
    ]
    yield Case(
        "gradient moments, all Linear layers but the head",
        lambda: partial(
            launch_gradient_moments, [MomentProblem(drawn(tokens, i), drawn(tokens, o), samples) for o, i in shapes]
        ),
        sum(2 * rows * o * i for o, i in shapes),
        sum(2 * rows * (o + i) for o, i in shapes),
        1,
    )


def _counting(arch: Mapping[str, Any], samples: int, tokens: int, *, hamming: bool = False) -> Callable[[], Any]:
    words = [
        pack_signs(torch.randn(samples, tokens, mlp_width(arch["embed_dim"], ratio), device="cuda"))
        for ratio in arch["mlp_ratio"]
    ]
    return partial(hamming_kernel if hamming else count_patterns_device, words, samples)


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
