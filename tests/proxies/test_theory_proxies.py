from __future__ import annotations

import math

import torch
from theory_networks import batch, cnn, evidence_of, vit

import lswag_fast
from lswag_fast.proxies import registry
from lswag_fast.proxies.az_nas import AzNas
from lswag_fast.proxies.tcet import Tcet
from lswag_fast.proxies.te_nas import TeNas

NAMES = [name for name in registry.names() if name.startswith(("te_nas", "az_nas", "tcet"))]


def test_the_model_is_left_as_it_was() -> None:
    model = cnn(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = batch()
    given = images.clone()
    with evidence_of(model, images, labels) as evidence:
        for proxy in (TeNas(), AzNas(), Tcet()):
            proxy.value(evidence)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(images, given)


def test_score_gives_them_and_their_parts() -> None:
    for model in (cnn(True), vit()):
        images, labels = batch()
        result = lswag_fast.score(model, images, labels, proxies=NAMES, dtype="float32", seed=3)
        assert not [text for text in result.warnings if "has no value" in text or "failed" in text]
        with evidence_of(model, images, labels) as evidence:
            for name in NAMES:
                value = registry.get(name)().value(evidence)
                assert math.isclose(result.proxies[name], value, rel_tol=1e-6), name
        inside = lswag_fast.score(model, images, labels, proxies=NAMES, dtype="float32", seed=3, window=(40, 60))
        for name in NAMES:
            assert math.isclose(inside.proxies[name], result.proxies[name], rel_tol=1e-4), name


def test_every_proxy_of_the_library_has_a_value_and_its_seconds_on_a_transformer() -> None:
    images, labels = batch()
    result = lswag_fast.score(vit(), images, labels, proxies=registry.names(), dtype="float32", seed=3)
    assert list(result.proxies) == list(result.proxy_seconds) == list(registry.names())
    assert all(math.isfinite(value) for value in result.proxies.values())
    assert all(seconds > 0 for seconds in result.proxy_seconds.values())
    conditions = {"jacov": "conditioning", "grasp": "conditioning", "te_nas_ntk": "relative_rounding"}
    assert all(result.proxy_details[name][detail] > 0 for name, detail in conditions.items())


def test_all_are_registered_with_a_source() -> None:
    assert len(NAMES) == 9
    for name in NAMES:
        proxy = registry.get(name)
        assert proxy.name == name
        assert proxy.source
        assert proxy().to_dict()["name"] == name
