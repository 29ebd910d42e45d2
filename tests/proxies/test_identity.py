"""What tells two proxies apart in the key of a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from lswag_fast import proxies
from lswag_fast.engine.identity import Context
from lswag_fast.errors import InputError
from lswag_fast.options import ScoreOptions
from lswag_fast.proxies import Proxy, registry
from lswag_fast.proxies.evidence import Evidence
from lswag_fast.proxies.zico import Zico


@dataclass(frozen=True)
class First(Proxy):
    name: ClassVar[str] = "mine"
    source: ClassVar[str] = "nowhere"
    gradient_based: ClassVar[bool] = False

    def value(self, evidence: Evidence) -> float:
        return 1.0


@dataclass(frozen=True)
class Second(First):
    lower_is_better: ClassVar[bool] = True


class WithState(First):
    name: ClassVar[str] = "stateful"

    def __init__(self) -> None:
        self.power = 2


class Shadow(Zico):
    pass


def context(*chosen: str | Proxy) -> Context:
    images = torch.arange(4 * 3 * 8 * 8.0).reshape(4, 3, 8, 8)
    options = ScoreOptions(device="cpu", dtype="float32", seed=3, proxies=chosen or ("lswag",)).resolved(4)
    return Context.of({"name": "s"}, images, None, options, "seed:3", "cross_entropy")


def test_lswag_alone_has_the_key_of_stores_that_knew_no_other_proxy() -> None:
    assert context().id == "9800f81d0eaa5fbd4d8c40e1c52094aedba3521fee3e0a7aea796e721465d691"
    assert len({context(*chosen).id for chosen in ((), ("lswag",), ("zico",), ("lswag", "zico"))}) == 3


def test_classes_of_one_name_have_keys_of_their_own() -> None:
    assert First().to_dict() == {"name": "mine", "class": f"{__name__}.First", "lower_is_better": False}
    assert context(First()).id != context(Second()).id


def test_the_class_of_a_registered_proxy_is_its_name() -> None:
    for name in proxies.names():
        kind = proxies.get(name)
        assert registry.is_registered(kind)
        assert "class" not in kind().to_dict()


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        (WithState, r"WithState has power set, but is no frozen dataclass.*write @dataclass\(frozen=True\)"),
        (Shadow, r"Shadow has the name 'zico' of another proxy; give it one of its own"),
    ],
)
def test_a_proxy_that_a_key_cannot_tell_is_refused(proxy: type[Proxy], message: str) -> None:
    with pytest.raises(InputError, match=message):
        registry.chosen((proxy(),))
