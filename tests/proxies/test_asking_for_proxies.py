"""What score() does with the proxies that it is asked for: choices, windows, failures, seconds."""

from __future__ import annotations

import itertools
import math
import re
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import networks
import pytest
import torch
from shared_networks import SHARED, batch, build

import lswag_fast
from lswag_fast import clock, proxies, scoring, spaces
from lswag_fast import reference_saliency as definitions
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.errors import InputError
from lswag_fast.options import ScoreOptions
from lswag_fast.proxies import evidence as evidence_module
from lswag_fast.proxies import statistics
from lswag_fast.proxies.evidence import Evidence
from lswag_fast.proxies.proxy import Need, Proxy


@dataclass(frozen=True)
class Broken(Proxy):
    name: ClassVar[str] = "broken"
    source: ClassVar[str] = "nowhere"
    gradient_based: ClassVar[bool] = False

    def value(self, evidence: Evidence) -> float:
        raise ValueError("no such thing")


def test_passes_outside_the_window_are_those_of_the_whole_network() -> None:
    model, (images, labels) = build("attention"), batch()
    whole = lswag_fast.score(model, images, labels, dtype="float32", proxies=("te_nas_ntk",))
    part = lswag_fast.score(model, images, labels, dtype="float32", window=(0, 30), proxies=("te_nas_ntk",))
    assert part.proxies == whole.proxies


def test_passes_in_float32_see_images_in_float32() -> None:
    model, (images, labels) = build("convolutions"), batch()
    chosen = ("jacov", "te_nas_ntk")
    found = [lswag_fast.score(model, images, labels, dtype=d, proxies=chosen) for d in ("float32", "bfloat16")]
    assert found[0].proxies == found[1].proxies


def test_details_are_told() -> None:
    model, (images, labels) = build("convolutions"), batch()
    result = lswag_fast.score(model, images, labels, dtype="float32", proxies=("jacov", "snip"))
    assert set(result.proxy_details) == {"jacov"}
    assert result.proxy_details["jacov"]["conditioning"] > 1


def test_a_proxy_that_runs_out_of_memory_loses_nothing_else() -> None:
    attempts: list[int] = []

    @dataclass(frozen=True)
    class Hungry(Broken):
        times: int = 1

        def value(self, evidence: Evidence) -> float:
            attempts.append(1)
            if len(attempts) <= self.times:
                raise torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation")
            return 2.0

    model, (images, labels) = build("convolutions"), batch()
    assert lswag_fast.score(model, images, labels, proxies=(Hungry(),)).proxies["broken"] == 2
    attempts.clear()
    result = lswag_fast.score(model, images, labels, proxies=(Hungry(times=2),))
    assert math.isnan(result.proxies["broken"])
    assert result.lswag > 0
    assert any("broken failed: OutOfMemoryError: CUDA out of memory." in text for text in result.warnings)


def test_fisher_says_whose_outputs_are_not_seen() -> None:
    model, (images, labels) = networks.SharedTable(), batch()
    result = lswag_fast.score(model, images, labels, dtype="float32", proxies=("fisher", "snip"))
    assert math.isnan(result.proxies["fisher"])
    assert any("fisher has no value: the outputs of table.weight" in text for text in result.warnings)
    assert math.isfinite(result.proxies["snip"])


def test_lswag_is_the_same_whatever_is_asked_for_beside_it() -> None:
    model, (images, labels) = build("attention"), batch()
    alone = lswag_fast.score(model, images, labels, dtype="float32")
    beside = lswag_fast.score(model, images, labels, dtype="float32", proxies=("lswag", *SHARED))
    assert alone.layers == beside.layers
    assert (alone.lswag, alone.expressivity) == (beside.lswag, beside.expressivity)
    assert beside.proxies["lswag"] == alone.proxies["lswag"] == alone.lswag


def test_proxies_of_the_whole_network_look_outside_the_window() -> None:
    model, (images, labels) = build("attention"), batch()
    whole = lswag_fast.score(model, images, labels, dtype="float32", proxies=("lambda", *SHARED[1:]))
    part = lswag_fast.score(model, images, labels, dtype="float32", window=(20, 50), proxies=("lambda", *SHARED[1:]))
    bare = lswag_fast.score(model, images, labels, dtype="float32", window=(20, 50))
    for name in set(SHARED) - {"lambda", "psi"}:
        assert part.proxies[name] == whole.proxies[name], name
    # Where patterns are packed, GELU is ours and not torch's.
    assert part.proxies["lambda"] == pytest.approx(bare.trainability, rel=1e-6)
    assert part.proxies["lambda"] == part.trainability < whole.proxies["lambda"]
    assert part.proxies["psi"] == bare.expressivity < whole.proxies["psi"]
    assert [row.in_window for row in part.layers] == [row.in_window for row in bare.layers]
    assert part.counts == bare.counts


def test_norms_of_slices_are_those_of_the_definition() -> None:
    space = spaces.get("autoformer-base", image_size=32, num_classes=10)
    supernet, images = space.supernet(0), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = ScoreOptions(dtype="float32", device="cpu", proxies=("l2_norm",)).resolved(2)
    arch = next(space.sample(1, seed=0))
    result = AutoFormerEngine(supernet, images, torch.arange(2), None, options).score(space.canonical(arch))
    expected = definitions.l2_norm(supernet.subnet(arch), [row.name for row in result.layers])
    assert result.proxies["l2_norm"] == pytest.approx(expected, rel=1e-12)


def test_engine_gives_what_score_gives() -> None:
    space = spaces.get("autoformer-tiny", image_size=32, num_classes=10)
    supernet = space.supernet(0)
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    chosen = ("lswag", *(name for name in SHARED if name != "fisher"), "jacov", "te_nas_ntk", "synflow")
    options = ScoreOptions(dtype="float32", device="cpu", proxies=chosen).resolved(6)
    engine = AutoFormerEngine(supernet, images, labels, None, options)
    for arch in space.sample(2, seed=0):
        found = engine.score(space.canonical(arch))
        expected = lswag_fast.score(supernet.subnet(arch), images, labels, dtype="float32", proxies=chosen)
        for name in chosen:
            scale = expected.proxies["snip" if name == "plain" else name]
            assert found.proxies[name] == pytest.approx(expected.proxies[name], abs=2e-4 * abs(scale)), name


def test_one_that_fails_takes_no_other_with_it() -> None:
    model, (images, labels) = build("convolutions"), batch()
    result = lswag_fast.score(model, images, labels, dtype="float32", proxies=(Broken(), "params"))
    assert math.isnan(result.proxies["broken"])
    assert any("broken failed: ValueError: no such thing" in text for text in result.warnings)
    assert math.isfinite(result.proxies["params"])


def own(**attributes: Any) -> Proxy:
    """A proxy of one's own, with class attributes or an option as given."""
    option = attributes.pop("option", 1.0)

    @dataclass(frozen=True)
    class Own(Proxy):
        option: Any = 1.0
        name: ClassVar[str] = "own"

        def value(self, evidence: Evidence) -> float:
            return math.nan

    for name, value in attributes.items():
        setattr(Own, name, value)
    Own.__qualname__ = "Own"
    return Own(option)


def test_a_value_that_is_none_is_told() -> None:
    model, (images, labels) = build("convolutions"), batch()
    found = lswag_fast.score(model, images, labels, dtype="float32", proxies=(own(needs=[]),))
    assert math.isnan(found.proxies["own"])
    assert "own has no value: it is NaN" in found.warnings


def test_what_was_not_asked_for_is_hinted_at() -> None:
    @dataclass(frozen=True)
    class Gradients(Broken):
        name: ClassVar[str] = "gradients"

        def value(self, evidence: Evidence) -> float:
            return evidence.layers[0].gradient.norm  # type: ignore[union-attr]

    model, (images, labels) = build("convolutions"), batch()
    found = lswag_fast.score(model, images, labels, dtype="float32", proxies=(Gradients(),))
    assert any(text.endswith("no attribute 'norm'; what it does not need is None") for text in found.warnings)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("zicoo",), r"no proxy is called 'zicoo'; there are lswag, lambda"),
        (("zico", "zico"), r"holds 'zico' twice"),
        ("zico", r"proxies is a sequence.*write \('zico',\)"),
        ((3,), r"proxies holds 3, which is neither a name"),
        (None, r"proxies is a sequence of names or proxies, got None"),
        ((own(name=None),), r"Own has no name to be known by; write name = '...' in it"),
        ((own(needs=Need.MOMENTS),), r"Own needs <Need.MOMENTS: 1>, which is no set of lswag_fast.proxies.Need"),
        ((own(needs=("moments",)),), r"Own needs \('moments',\), which is no set"),
        ((own(option=torch.ones(2)),), r"Own has an option that a store cannot keep \(Object of type Tensor"),
    ],
)
def test_bad_choices_are_refused(asked: object, message: str) -> None:
    images, labels = batch()
    with pytest.raises(InputError, match=message):
        lswag_fast.score(build("convolutions"), images, labels, proxies=asked)  # type: ignore[arg-type]


def test_every_registered_proxy_says_what_it_is() -> None:
    for name in proxies.names():
        kind = proxies.get(name)
        assert kind.name == name
        assert re.search(r"\b20[012]\d\b", kind.source), name
        assert kind.__doc__
        assert isinstance(kind.gradient_based, bool)


FROM_PASS = ("lswag", *SHARED, "az_nas_complexity")


def test_those_made_of_the_pass_are_known() -> None:
    assert {name for name in proxies.names() if proxies.get(name).from_pass} == set(FROM_PASS)


@pytest.mark.parametrize("window", [(0, 100), (0, 50)])
def test_those_made_of_the_pass_read_nothing_else(window: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = build("convolutions"), batch()
    chosen = [name for name in proxies.names() if proxies.get(name).from_pass]
    whole, expected = (
        lswag_fast.score(model, images, labels, dtype="float32", window=of, proxies=chosen) for of in ((0, 100), window)
    )
    given = scoring.Scored._evidence

    def without_a_network(shared: object) -> NoReturn:
        raise AssertionError("the network was asked for")

    def numbers_alone(self: scoring.Scored, *values: Any) -> Evidence:
        evidence = given(self, *values)
        nothing = tuple(torch.empty_like(w, device="meta") for w in evidence.words)
        return replace(evidence, words=nothing, make_network=without_a_network)

    monkeypatch.setattr(scoring.Scored, "_evidence", numbers_alone)
    found = lswag_fast.score(model, images, labels, dtype="float32", window=window, proxies=chosen)
    assert found.proxies == expected.proxies
    assert found.proxies["swap"] == whole.proxies["swap"]
    assert (found.proxies["psi"] < found.proxies["swap"]) == (window != (0, 100))
    assert all(map(math.isfinite, found.proxies.values()))
    assert not any("failed" in text for text in found.warnings)


def test_the_host_has_a_clock_of_its_own_beside_a_device() -> None:
    beside = clock.Clock("cuda")
    for _ in range(2):
        with beside.on_host("counting"):
            time.sleep(0.01)
    assert beside.seconds()["counting"] >= 0.02
    with clock.Clock("cuda", running=False).on_host("nothing"):
        pass


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every stretch of work takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("ticking")
def test_seconds_of_each() -> None:
    model, (images, labels) = build("convolutions"), batch()
    result = lswag_fast.score(model, images, labels, dtype="float32", proxies=SHARED)
    seconds = result.proxy_seconds
    assert set(seconds) == set(SHARED)
    assert all(0 < value < result.seconds for value in seconds.values())
    assert seconds["params"] == seconds["flops"] == 1
    assert (
        seconds["params"]
        < seconds["l2_norm"]
        < seconds["swap"]
        < seconds["nwot"]
        < min(seconds["zico"], seconds["snip"])
    )


@dataclass(frozen=True)
class Regions(Broken):
    """Reads what it does not say that it needs."""

    name: ClassVar[str] = "regions"
    needs: ClassVar[Any] = (Need.PATTERNS,)

    def value(self, evidence: Evidence) -> float:
        return evidence.distinct_patterns + float(evidence.agreements.sum())


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("window", [(0, 100), (0, 50)])
@pytest.mark.parametrize("proxy", ["te_nas_regions", Regions(), "nwot", "swap"])
def test_the_seconds_of_a_proxy_do_not_hang_on_others(proxy: Any, window: tuple[int, int]) -> None:
    model, (images, labels) = build("convolutions"), batch()
    name = proxy if isinstance(proxy, str) else proxy.name
    found = [
        lswag_fast.score(model, images, labels, dtype="float32", window=window, proxies=asked)
        for asked in ((proxy,), (proxy, *({"nwot", "swap", "l2_norm", "params"} - {name})))
    ]
    alone, beside = (result.proxy_seconds[name] for result in found)
    if name != "regions":  # whose own is in several stretches, by those of the work inside it
        assert alone == beside > 0
    assert found[0].proxies[name] == found[1].proxies[name] > 0


@pytest.mark.parametrize(
    ("what", "lost"),
    [("hamming_kernel", "nwot"), ("count_patterns_device", "swap"), ("norm_of", "l2_norm")],
)
def test_what_fails_for_one_proxy_leaves_the_others(what: str, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = build("convolutions"), batch()
    asked = {"window": (0, 50), "proxies": ("lswag", "zico", "nwot", "swap", "l2_norm")}
    expected = lswag_fast.score(model, images, labels, dtype="float32", **asked)  # type: ignore[arg-type]
    psi = iter([getattr(statistics, what)] if what == "count_patterns_device" else [])

    def failing(*given: Any) -> Any:
        return next(psi, too_much)(*given)

    def too_much(*_: Any) -> NoReturn:
        raise torch.OutOfMemoryError("out of memory")

    for module in (statistics, scoring, evidence_module):
        if hasattr(module, what):
            monkeypatch.setattr(module, what, failing)
    found = lswag_fast.score(model, images, labels, dtype="float32", **asked)  # type: ignore[arg-type]
    assert found.lswag == expected.lswag
    for name, value in expected.proxies.items():
        # Patterns are counted again when their number is read.
        assert found.proxies[name] == value or (name == lost != "swap" and math.isnan(found.proxies[name]))


def test_a_derived_class_has_to_say_again_that_it_reads_the_pass_alone() -> None:
    @dataclass(frozen=True)
    class Mine(proxies.get("nwot")):  # type: ignore[misc]
        name: ClassVar[str] = "mine"

        def value(self, evidence: Evidence) -> float:
            return float(len(evidence.network.parameters()))

    @dataclass(frozen=True)
    class Lying(Mine):
        name: ClassVar[str] = "lying"
        from_pass: ClassVar[bool] = True

    model, (images, labels) = build("convolutions"), batch()
    result = lswag_fast.score(model, images, labels, dtype="float32", proxies=(Mine(), Lying()))
    assert (Mine.from_pass, Lying.from_pass) == (False, True)
    assert result.proxies["mine"] == len(list(model.parameters()))
    assert math.isnan(result.proxies["lying"])
    assert any("lying failed: InputError: " in text and "leave from_pass out" in text for text in result.warnings)


@pytest.mark.usefixtures("ticking")
def test_a_pass_that_proxies_share_is_in_the_seconds_of_each() -> None:
    model, (images, labels) = build("convolutions"), batch()
    both = ("jacov", "epe_nas", "te_nas", "te_nas_ntk", "params")
    seconds = lswag_fast.score(model, images, labels, dtype="float32", proxies=both).proxy_seconds
    assert seconds["params"] == 1
    # Shared are the network as such, which is made ready within the pass, and the pass; one's own work is what is left.
    assert seconds["jacov"] == 5
    assert seconds["epe_nas"] > 2
    assert seconds["te_nas_ntk"] > 2
