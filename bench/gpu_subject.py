"""The middle candidate of a space on a GPU: its score, plain passes and other ways to per-sample gradients."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import per_sample_gradients
import torch
import torch.nn.functional as F
from gpu_cases import MIDDLE, score_bytes
from gpu_timing import timed
from original_autoformer import original_candidate
from torch import Tensor

from lswag_fast import images, proxies, spaces
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.engine.cuda_graphs import no_captures
from lswag_fast.options import ScoreOptions
from lswag_fast.proxies.proxy import Need

FROM_PASS = tuple(
    name for name in proxies.names() if (kind := proxies.get(name)).from_pass and Need.OUTPUTS not in kind.needs
)
"""The proxies that a candidate of a supernet has from L-SWAG's own pass, L-SWAG among them."""


class Subject:
    """The middle candidate of a space, its supernet and Gaussian images, on the GPU."""

    def __init__(self, name: str, samples: int) -> None:
        self.name = name
        self.space = spaces.get(name, image_size=224, patch_size=16, num_classes=1000)
        self.arch = self.space.canonical(MIDDLE[name])
        self.samples = samples
        data = images.load("noise", samples, image_size=224, seed=0)
        options = ScoreOptions(dtype="bfloat16", device="cuda").resolved(samples)
        self.supernet = self.space.supernet(seed=0)
        given = (self.supernet, data.images, data.labels, None)
        self.engine = AutoFormerEngine(*given, options)
        self.without_graphs = AutoFormerEngine(*given, options, captures=no_captures)
        self.with_others = AutoFormerEngine(*given, replace(options, proxies=FROM_PASS))
        self.images, self.labels = data.images.cuda().bfloat16(), data.labels.cuda()

    def score(self) -> Any:
        return self.engine.score(self.arch)

    def plain_pass(self, how: str) -> dict[str, float]:
        """Returns the times of a plain bfloat16 forward and backward pass to every parameter, and with a wait after."""
        if how == "space.build":
            model = self.space.build(self.arch, supernet=self.supernet)
        else:
            model = original_candidate(self.space, self.arch, self.supernet.subnet(self.arch).state_dict())
        call = partial(_plain_pass, model.to("cuda", torch.bfloat16), self.images, self.labels)

        def waiting() -> None:
            call()
            torch.cuda.synchronize()

        return {**timed(call), "seconds_with_a_wait": timed(waiting, waits=True)["seconds"]}

    def candidates_a_minute(self, candidates: int = 64, *, others: bool = False) -> dict[str, float]:
        """Returns how many different ones are scored a minute, by how many are under way at a time.

        `others`: with other proxies, and with two under way alone.
        """
        engine = self.with_others if others else self.engine
        archs = list(self.space.sample(candidates, seed=1))
        found = {}
        # Most of what different candidates share has been recorded after some hundred.
        ways = [(1, 0, "one at a time, the first"), (1, 250, "one at a time"), (2, 400, "two in flight")]
        for most, before, how in ways[2:] if others else ways:
            self._in_turn(engine, self.space.sample(before, seed=2), most)
            found[how] = 60 * candidates / self._in_turn(engine, archs, most)
        return found

    def _in_turn(self, engine: AutoFormerEngine, archs: Iterable[Mapping[str, Any]], most: int) -> float:
        """Returns the seconds of scoring candidates, `most` of them under way at a time."""
        pending: deque[Any] = deque()
        started = time.perf_counter()
        for arch in archs:
            pending.append(engine.launch(arch))
            if len(pending) == most:
                pending.popleft().finish()
        while pending:
            pending.popleft().finish()
        return time.perf_counter() - started

    def peer(self, how: str) -> Callable[[], Any]:
        """Returns a run of another way to Lambda, on the published formulation in bfloat16."""
        published = original_candidate(self.space, self.arch, self.supernet.subnet(self.arch).state_dict())
        model = per_sample_gradients.with_plain_modules(published.to("cuda", torch.bfloat16))
        run: Callable[[], Any] = getattr(per_sample_gradients, how)(model, self.images, self.labels)
        return run

    def profile(self) -> dict[str, Any]:
        """Returns what the device does for one score: how many launches, their milliseconds, and both by kernel."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self.score()
        on_device = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        longest = sorted(on_device, key=lambda e: -e.self_device_time_total)[:25]
        return {
            "launches": sum(e.count for e in on_device),
            "milliseconds": sum(e.self_device_time_total for e in on_device) / 1e3,
            "longest": {e.key[:80]: [e.count, e.self_device_time_total / 1e3] for e in longest},
        }

    def flops_and_bytes(self) -> tuple[float, float]:
        """Returns what one score multiplies, 2 * 3 a multiply-add of the forward pass, and what its kernels move."""
        return 6.0 * self.space.macs(self.arch) * self.samples, score_bytes(self.arch, self.samples)


def _plain_pass(model: torch.nn.Module, pictures: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(pictures).float(), labels).backward()
    model.zero_grad(set_to_none=True)
