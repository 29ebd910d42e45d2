"""The order in which numbers of a device come to the host, with a device that is not there."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lswag_fast import host_copies
from lswag_fast.host_copies import HostCopies


def test_tensors_of_the_cpu_are_taken_as_they_are() -> None:
    losses = torch.ones(3)
    assert HostCopies({"losses": losses}).wait()["losses"] is losses
    assert HostCopies({}).wait() == {}


def test_one_event_behind_all_copies_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []

    class Event:
        def record(self) -> None:
            order.append("recorded")

        def synchronize(self) -> None:
            order.append("waited")

    monkeypatch.setattr(host_copies, "_pinned", lambda tensor: order.append(tensor.name) or f"copy of {tensor.name}")
    monkeypatch.setattr(torch.cuda, "device", lambda device: order.append(str(device)) or nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    moments, counts = (
        SimpleNamespace(name=name, is_cuda=True, device=torch.device("cuda", 1)) for name in ("moments", "counts")
    )
    here = torch.ones(2)
    copies = HostCopies({"here": here, "moments": moments, "counts": counts})
    assert order == ["cuda:1", "moments", "counts", "recorded"]
    assert copies.wait() == {"here": here, "moments": "copy of moments", "counts": "copy of counts"}
    copies.wait()
    assert order[4:] == ["waited"]
