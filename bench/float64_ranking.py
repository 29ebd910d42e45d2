"""Scores 200 fixed AutoFormer-Tiny candidates in float64, once: what the ranking of faster arithmetic is held to.

Appends a line a candidate to `SCORES`, ten to twenty seconds of one core each; started again, it goes on where it
stopped. The first line says what everything below it was computed with. With --check, scores all of them in
float32 and bfloat16 and writes how far these are from float64, in values and in ranks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import write
from torch import Tensor, nn

import lswag_fast
from lswag_fast import images, reference, spaces
from lswag_fast.correlation import kendall_tau
from lswag_fast.options import DEFINITION_VERSION
from lswag_fast.spaces.autoformer import AutoFormerSupernet

RESULTS = Path(__file__).resolve().parent / "results"
SCORES = RESULTS / "autoformer-tiny-float64.jsonl"

SPACE = {"name": "autoformer-tiny", "image_size": 224, "patch_size": 16, "num_classes": 1000}
CANDIDATES = 200
CANDIDATE_SEED = 7
SUPERNET_SEED = 0
IMAGE_SEED = 0
SAMPLES = 16
STRATUM = 10
"""Strata of fewer candidates are not ranked by themselves."""


def batch() -> images.ImageBatch:
    """Returns the Gaussian images and the labels of every score."""
    return images.load("noise", SAMPLES, image_size=SPACE["image_size"], seed=IMAGE_SEED)


def candidates() -> list[dict[str, Any]]:
    return list(spaces.get(**SPACE).sample(CANDIDATES, seed=CANDIDATE_SEED))


def supernet() -> AutoFormerSupernet:
    return spaces.get(**SPACE).supernet(seed=SUPERNET_SEED)


def strata(archs: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], list[int]]:
    """Returns the indices of the candidates by (embedding, depth), of strata large enough to be ranked."""
    found: dict[tuple[int, int], list[int]] = {}
    for index, arch in enumerate(archs):
        found.setdefault((arch["embed_dim"], arch["depth"]), []).append(index)
    return {key: rows for key, rows in sorted(found.items()) if len(rows) >= STRATUM}


def read_scores(path: Path = SCORES) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the header and the scored candidates; a last line torn by a kill is not read."""
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return (lines[0], lines[1:]) if lines else ({}, [])


def score_float64(net: AutoFormerSupernet, arch: Mapping[str, Any], data: images.ImageBatch) -> dict[str, Any]:
    """Returns one line of the file: terms are log(sum of 1/sigma) of the layers, by first use."""
    start = time.perf_counter()
    result = reference.lswag(net.subnet(arch), data.images, data.labels)
    return {
        "arch": arch,
        "lswag": result.lswag,
        "trainability": result.trainability,
        "expressivity": result.expressivity,
        "positions": result.positions,
        "log_sum_inverse_sigma": [m.log_sum_inverse_sigma for m in result.moments],
        "dead": [int(m.dead.sum()) for m in result.moments],
        "seconds": round(time.perf_counter() - start, 2),
    }


def compute(path: Path = SCORES) -> None:
    """Appends the scores of all candidates that the file lacks."""
    net, data = supernet(), batch()
    known, done = read_scores(path)
    if known and known["settings"] != settings():
        raise SystemExit(f"{path} was computed with other settings: {known['settings']}; move it away to start anew")
    scored = {json.dumps(line["arch"]) for line in done}
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with path.open("a") as file:
        if not known:
            file.write(json.dumps({"settings": settings(), "computed_with": _provenance(net, data)}) + "\n")
        for arch in candidates():
            if json.dumps(arch) not in scored:
                file.write(json.dumps(score_float64(net, arch, data)) + "\n")
                file.flush()


def settings() -> dict[str, Any]:
    """Returns what the scores depend on, and every machine reproduces."""
    return {
        "space": SPACE,
        "candidates": CANDIDATES,
        "candidate_seed": CANDIDATE_SEED,
        "supernet_seed": SUPERNET_SEED,
        "images": "noise",
        "image_seed": IMAGE_SEED,
        "samples": SAMPLES,
        "groups": SAMPLES,
        "definition": DEFINITION_VERSION,
    }


def _provenance(net: AutoFormerSupernet, data: images.ImageBatch) -> dict[str, Any]:
    """Returns versions, and digests of tensors whose last bits may differ where random numbers are drawn otherwise."""
    return {
        "supernet_sha256": net.digest(),
        "images_sha256": _digest(data.images),
        "labels_sha256": _digest(data.labels),
        "lswag_fast": lswag_fast.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()


def rank(
    net: AutoFormerSupernet, data: images.ImageBatch, lines: Sequence[Mapping[str, Any]], dtype: str
) -> dict[str, Any]:
    """Scores candidates in `dtype` and returns how their values and ranks differ from the float64 ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [lswag_fast.score(net.subnet(s["arch"]), data.images, data.labels, dtype=dtype) for s in lines]
    exact, found = [line["lswag"] for line in lines], [r.lswag for r in results]
    by_stratum = {
        f"embed_dim {embed}, depth {depth}": kendall_tau([exact[i] for i in rows], [found[i] for i in rows])
        for (embed, depth), rows in strata([line["arch"] for line in lines]).items()
    }
    return {
        "candidates": len(lines),
        "tau": kendall_tau(exact, found),
        "tau_by_stratum": by_stratum,
        "largest_error_of_a_log_term": max(map(log_term_error, results, lines)),
        "largest_relative_error_of_a_score": max(abs(f / e - 1) for f, e in zip(found, exact, strict=True)),
    }


def log_term_error(result: lswag_fast.LswagResult, line: Mapping[str, Any]) -> float:
    """Returns the largest difference of a layer's log(sum of 1/sigma) from its float64 value."""
    terms = np.array([row.log_sum_inverse_sigma for row in result.layers])
    return float(np.abs(terms - line["log_sum_inverse_sigma"]).max())


def sign_differences(net: AutoFormerSupernet, arch: Mapping[str, Any], pictures: Tensor, dtype: str) -> dict[str, int]:
    """Returns how many activations of a candidate have another sign than in float64."""
    signs = []
    for precision in (torch.float64, getattr(torch, dtype)):
        candidate = net.cast(precision).subnet(arch)
        seen = gelu_signs(candidate)
        with torch.no_grad():
            candidate(pictures.to(precision))
        signs.append(torch.cat([s.flatten(1) for s in seen], dim=1))
    differ = signs[0] != signs[1]
    return {
        "activations": differ.numel(),
        "other_sign": int(differ.sum()),
        "positions": differ.shape[1],
        "positions_with_another_sign": int(differ.any(0).sum()),
    }


def gelu_signs(candidate: nn.Module) -> list[Tensor]:
    """Returns a list that fills with the signs of each GELU's output, bool [S, ...], whenever a pass computes them."""
    signs: list[Tensor] = []

    def note(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        # Passes on shapes alone, and on a couple of samples that settle where the samples are, come first.
        if output.device.type != "meta":
            if signs and len(output) != len(signs[0]):
                signs.clear()
            signs.append(output.detach() > 0)

    for module in candidate.modules():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(note)
    return signs


def check() -> None:
    """Ranks all candidates in each dtype, prints what comes out, and writes it."""
    net, data = supernet(), batch()
    _, lines = read_scores()
    firsts = [lines[rows[0]]["arch"] for rows in strata([line["arch"] for line in lines]).values()]
    found = {
        dtype: {
            **rank(net, data, lines, dtype),
            "signs": [sign_differences(net, arch, data.images, dtype) for arch in firsts],
        }
        for dtype in ("float32", "bfloat16")
    }
    write("cpu", "ranking", {"settings": settings(), "against_float64": found})
    print(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="rank in float32 and bfloat16 against the file")
    check() if parser.parse_args().check else compute()


if __name__ == "__main__":
    main()
