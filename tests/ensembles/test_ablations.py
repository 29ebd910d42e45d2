from __future__ import annotations

import numpy as np
import pytest

from lswag_fast import InputError, libra, proxies
from lswag_fast.ensembles.ablations import GRADIENT_BASED, ablations


def benchmark(rows: int = 80):
    generator = np.random.default_rng(0)
    params = generator.normal(size=rows)
    accuracy = params + generator.normal(size=rows)
    names = ("snip", "nwot", "jacov", "flops", "synflow", "zen", "fisher")
    noise = (0.5, 0.6, 0.55, 0.65, 0.7, 2.0, 2.0)
    size = enumerate(zip(names, noise, strict=True))
    scores = {name: accuracy + (i - 3) / 6 * params + s * generator.normal(size=rows) for i, (name, s) in size}
    return scores, accuracy, params


def test_rows_of_the_table_follow_their_rules():
    scores, accuracy, params = benchmark()
    table = ablations(scores, accuracy, params, resamples=0)
    whole = libra(scores, accuracy, params, resamples=0)
    rho = {c.name: c.rho for c in whole.candidates}
    gain = {c.name: c.information_gain for c in whole.candidates if c.in_reach}
    free, based = ([n for n in rho if GRADIENT_BASED[n] is kind] for kind in (False, True))
    assert table["two gradient-free"].names == tuple(free[:2])
    assert table["two gradient-based"].names == tuple(based[:2])
    assert table["one of each"].names == (free[0], based[0])
    assert table["maximal information gain"].names == (whole.names[0], max(gain, key=gain.__getitem__))
    assert table["minimal information gain"].names == table["without z3"].names == whole.names[:2]
    assert table["matching bias"].names == whole.names
    np.testing.assert_array_equal(table["matching bias"].score, whole.score)
    rest = [c for c in whole.candidates if c.in_reach and c.name != whole.names[1]]
    assert len(rest) > 1
    assert table["minimal bias"].names != table["matching bias"].names
    assert table["minimal bias"].names[2] == min(rest, key=lambda c: abs(c.bias)).name


def test_random_rows_are_drawn_by_the_seed():
    scores, accuracy, params = benchmark()
    tables = [ablations(scores, accuracy, params, resamples=0, seed=seed) for seed in range(30)]
    again = ablations(scores, accuracy, params, resamples=0, seed=4)
    whole = libra(scores, accuracy, params, resamples=0)
    assert tables[4]["two random"].names == again["two random"].names
    assert {n for t in tables for n in t["two random"].names} == set(scores)
    reach = {c.name for c in whole.candidates if c.in_reach} - {whole.names[1]}
    assert {t["random z3"].names[2] for t in tables} == reach
    assert all(t["random z3"].names[:2] == whole.names[:2] for t in tables)


def test_a_row_without_enough_proxies_says_so():
    scores, accuracy, params = benchmark()
    table = ablations({"nwot": scores["nwot"], "flops": scores["flops"]}, accuracy, params)
    assert table["two gradient-based"].names == ()
    assert np.isnan(table["two gradient-based"].rho)
    assert table["one of each"].names == ("flops",)
    assert table["one of each"].notes == ("1 of 2 proxies: no other is in reach or of the kind",)
    assert table["random z3"].notes == ("2 of 3 proxies: no other is in reach or of the kind",)


def test_what_is_left_out_is_told_of_every_row():
    scores, accuracy, params = benchmark()
    table = ablations({**scores, "flat": np.zeros(len(accuracy))}, accuracy, params, resamples=0)
    assert all(row.notes[0] == "flat is left out: it is 0 on every architecture" for row in table.values())


def test_every_proxy_of_the_library_is_of_a_kind():
    assert set(GRADIENT_BASED) == set(proxies.names())
    # As NAS-Bench-Suite-Zero has them: with a backward pass of the loss or of outputs, or without.
    published = {"zen", "nwot", "flops", "params", "l2_norm"}
    published_based = {"epe_nas", "fisher", "grad_norm", "grasp", "jacov", "plain", "snip", "synflow"}
    assert not any(GRADIENT_BASED[name] for name in published)
    assert all(GRADIENT_BASED[name] for name in published_based)
    scores, accuracy, params = benchmark()
    table = ablations({"zico": scores["snip"], "swap": scores["nwot"]}, accuracy, params, resamples=0)
    assert table["two gradient-based"].names == ("zico",)
    assert table["two gradient-free"].names == ("swap",)


def test_tags_of_other_proxies_can_be_given():
    scores, accuracy, params = benchmark()
    scores = {f"my_{name}": values for name, values in scores.items()}
    assert ablations(scores, accuracy, params, resamples=0)["two gradient-free"].names == ()
    tags = {name: name in ("my_snip", "my_jacov") for name in scores}
    table = ablations(scores, accuracy, params, resamples=0, gradient_based=tags)
    assert set(table["two gradient-based"].names) == {"my_snip", "my_jacov"}


def test_an_unknown_combination():
    with pytest.raises(InputError, match="combine is one of"):
        ablations(*benchmark(), combine="product")
