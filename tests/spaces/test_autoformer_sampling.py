"""Streams of AutoFormer candidates."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lswag_fast import spaces
from lswag_fast.errors import InputError
from lswag_fast.spaces.sampling import distinct_draws, permuted

NAMES = ("autoformer-tiny", "autoformer-small", "autoformer-base")


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_distinct_reproducible_and_nested(name: str) -> None:
    space = spaces.get(name)
    drawn = [space.encode(arch) for arch in space.sample(5000, seed=11)]
    assert len(set(drawn)) == 5000
    assert drawn[:1200] == [space.encode(arch) for arch in space.sample(1200, seed=11)]
    assert drawn[:50] != [space.encode(arch) for arch in space.sample(50, seed=12)]
    assert all(space.canonical(arch) == arch for arch in space.sample(20))


def test_a_seed_names_the_same_stream_in_every_version() -> None:
    space = spaces.get("autoformer-tiny", image_size=64)
    assert space.encode(next(space.sample(1, seed=0))) == (
        '{"depth":13,"embed_dim":240,"mlp_ratio":[4.0,3.5,3.5,4.0,3.5,3.5,3.5,4.0,4.0,3.5,3.5,3.5,3.5],'
        '"num_heads":[4,3,4,3,4,3,3,4,4,3,3,3,4]}'
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_is_drawn_uniformly_and_independently(name: str) -> None:
    """Bounds are about five standard deviations of the counts."""
    space = spaces.get(name)
    draws = 20_000
    archs = list(space.sample(draws, seed=13))
    choices = space.choices
    strata = Counter((arch["embed_dim"], arch["depth"]) for arch in archs)
    assert_uniform(strata, draws, len(choices.embed_dim) * len(choices.depth))
    for layer in (0, 5, 11):
        pairs = Counter((a["num_heads"][layer], a["mlp_ratio"][layer]) for a in archs)
        assert_uniform(pairs, draws, len(choices.num_heads) * len(choices.mlp_ratio))
        neighbours = Counter((a["num_heads"][layer - 1], a["num_heads"][layer], a["depth"]) for a in archs)
        assert_uniform(neighbours, draws, len(choices.num_heads) ** 2 * len(choices.depth))
        follows = Counter((a["mlp_ratio"][layer], b["mlp_ratio"][layer], b["embed_dim"]) for a, b in pairwise(archs))
        assert_uniform(follows, draws - 1, len(choices.mlp_ratio) ** 2 * len(choices.embed_dim))


def assert_uniform(counts: Counter[Any], draws: int, cells: int) -> None:
    expected = draws / cells
    assert len(counts) == cells
    assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5


@settings(deadline=None, max_examples=30)
@given(
    left=st.integers(1, 40), right=st.integers(1, 40), keys=st.lists(st.integers(0, 2**64 - 1), min_size=8, max_size=8)
)
def test_permuted_is_a_permutation(left: int, right: int, keys: list[int]) -> None:
    images = [permuted(index, left, right, keys) for index in range(left * right)]
    assert sorted(images) == list(range(left * right))


def test_sampling_takes_constant_memory() -> None:
    space = spaces.get("autoformer-tiny")
    stream = space.sample(1_000_000, seed=1)
    next(stream)
    tracemalloc.start()
    try:
        for _ in islice(stream, 20_000):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 1024


def test_more_samples_than_the_space_holds_is_an_input_error() -> None:
    space = spaces.get("autoformer-tiny")
    assert space.size == 3 * (4**12 + 4**13 + 4**14)
    with pytest.raises(InputError, match=f"holds {space.size} candidates"):
        space.sample(space.size + 1)
    with pytest.raises(InputError, match="got -1"):
        space.sample(-1)
    with pytest.raises(InputError, match="seed must be an integer"):
        space.sample(1, seed=-1)
    assert list(space.sample(0)) == []


def test_exhausted_strata_are_left_out() -> None:
    drawn = list(islice(distinct_draws([(2, 2), (3, 4), (1, 1)], "stream"), 100))
    assert sorted(drawn) == [(0, i) for i in range(4)] + [(1, i) for i in range(12)] + [(2, 0)]
