"""Calls on shapes alone against torch's own meta kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lswag_fast.capture.functions import Kind
from lswag_fast.capture.shapes import compute


def meta(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype, requires_grad=grad)


X, Y = (2, 5, 6), (2, 6, 5)
SUMS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "contiguous": lambda: (meta(*X), meta(*X)),
    "both transposed": lambda: (meta(*Y).transpose(1, 2), meta(*Y).transpose(1, 2)),
    "the first transposed": lambda: (meta(*Y).transpose(1, 2), meta(*X)),
    "the second transposed": lambda: (meta(*X), meta(*Y).transpose(1, 2)),
    "a slice": lambda: (meta(2, 5, 9)[..., :6], meta(*X)),
    "channels last": lambda: (meta(2, 4, 3, 5).permute(0, 3, 1, 2), meta(2, 5, 4, 3)),
    "expanded": lambda: (meta(2, 1, 6).expand(2, 5, 6), meta(*X)),
    "broadcast": lambda: (meta(*X), meta(1, 5, 6)),
    "a number": lambda: (meta(*X), 2.0),
    "two types": lambda: (meta(*X), meta(*X, dtype=torch.bfloat16)),
    "the narrower type first": lambda: (meta(*X, dtype=torch.bfloat16), meta(*X)),
    "whole numbers": lambda: (meta(*X, grad=False, dtype=torch.int64), meta(*X, grad=False, dtype=torch.int64)),
    "one without a graph": lambda: (meta(*X, grad=False), meta(*X)),
}
Q = (2, 3, 5, 4)
ATTENTION: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "plain": lambda: ((meta(*Q), meta(*Q), meta(*Q)), {}),
    "dropped": lambda: ((meta(*Q), meta(*Q), meta(*Q)), {"dropout_p": 0.1, "is_causal": True}),
    "other keys": lambda: ((meta(*Q), meta(2, 3, 7, 4), meta(2, 3, 7, 4)), {}),
    "wider values": lambda: ((meta(*Q), meta(*Q), meta(2, 3, 5, 8)), {}),
    "heads shared": lambda: ((meta(*Q), meta(2, 1, 5, 4), meta(2, 1, 5, 4)), {}),
    "masked": lambda: ((meta(*Q), meta(*Q), meta(*Q), meta(5, 5)), {}),
    "by keyword": lambda: ((), {"query": meta(*Q), "key": meta(*Q), "value": meta(*Q)}),
    "views": lambda: (tuple(meta(2, 5, 9, 4).permute(0, 2, 1, 3).unflatten(1, (3, 3)).unbind(1)), {}),
}


def assert_as_torch(found: Tensor, expected: Tensor, sources: tuple[Any, ...]) -> None:
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert found.requires_grad == expected.requires_grad
    assert leaves(found) == leaves(expected) == {id(t) for s in sources for t in [base(s)] if t is not None}


def base(source: Any) -> Tensor | None:
    if not isinstance(source, Tensor) or not source.requires_grad:
        return None
    return source if source._base is None else source._base


def leaves(tensor: Tensor) -> set[int]:
    """The tensors that a graph ends at."""
    found, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            found |= {id(node.variable)} if hasattr(node, "variable") else set()
            nodes += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("function", [torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__])
@pytest.mark.parametrize("operands", SUMS)
def test_sums(operands: str, function: Any) -> None:
    given = SUMS[operands]()
    found, expected = compute(None, function, given, {}), function(*given)
    assert_as_torch(found, expected, given)
    assert found.stride() == expected.stride()
    with torch.no_grad():
        assert compute(None, function, given, {}).stride() == expected.stride()


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: str) -> None:
    args, kwargs = ATTENTION[case]()
    found = compute(None, F.scaled_dot_product_attention, args, kwargs)
    expected = F.scaled_dot_product_attention(*args, **kwargs)
    assert_as_torch(found, expected, (*args, *kwargs.values()))


def test_what_torch_refuses_is_refused() -> None:
    with pytest.raises(RuntimeError):
        compute(None, torch.add, (meta(2, 3), meta(2, 4)), {})
    with pytest.raises(RuntimeError):
        compute(None, F.scaled_dot_product_attention, (meta(*Q), meta(2, 3, 5, 7), meta(2, 3, 5, 7)), {})


@pytest.mark.parametrize("function", [torch.mul, torch.add])
def test_a_number_that_torch_cannot_take_is_refused(function: Any) -> None:
    with pytest.raises((RuntimeError, OverflowError)):
        compute(None, function, (meta(*X), 10**30), {})


def test_a_function_of_one_sample_is_left_to_torch() -> None:
    """Under vmap a tensor has fewer axes than its memory says."""
    given = meta(*X)

    def doubled(x: Tensor) -> Tensor:
        found: Tensor = compute(None, torch.mul, (x, 2.0), {})
        return found

    assert_as_torch(torch.vmap(doubled)(given), given * 2.0, (given,))


def test_a_factor_of_a_sum_is_left_to_torch() -> None:
    """With out= or alpha= nothing is known here."""
    found = compute(None, torch.add, (meta(*X), meta(*X)), {"alpha": 2})
    assert found.grad_fn is not None
    assert found.grad_fn.name() == "AddBackward0"


SCALED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "contiguous": lambda: (meta(*X), 0.5),
    "by a whole number": lambda: (meta(*X), 2),
    "transposed": lambda: (meta(*Y).transpose(1, 2), 2.0),
    "a slice": lambda: (meta(2, 5, 9)[..., :6], 2.0),
    "expanded": lambda: (meta(2, 1, 6).expand(2, 5, 6), 2.0),
    "no axis": lambda: (meta(), 2.0),
    "of 16 bits": lambda: (meta(*X, dtype=torch.bfloat16), 2.0),
    "whole numbers": lambda: (meta(*X, grad=False, dtype=torch.int64), 2.0),
    "by a complex number": lambda: (meta(*X), 2j),
    "by a number that fits": lambda: (meta(*X), -(2**63)),
    "by a truth value": lambda: (meta(*X), True),
    "by a tensor": lambda: (meta(*X), meta()),
    "without a graph": lambda: (meta(*X, grad=False), 2.0),
}
SCALES = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div, Tensor.__truediv__)
SCALES = (*SCALES, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


@pytest.mark.parametrize("function", SCALES)
@pytest.mark.parametrize("operands", SCALED)
def test_products_and_sums_with_a_number(operands: str, function: Any) -> None:
    given = SCALED[operands]()
    found, expected = compute(None, function, given, {}), function(*given)
    assert_as_torch(found, expected, given)
    assert found.stride() == expected.stride()
    with torch.no_grad():
        assert compute(None, function, given, {}).stride() == expected.stride()


def statistics(channels: int = 3) -> tuple[Tensor, Tensor]:
    return meta(channels, grad=False), meta(channels, grad=False)


NORMALISED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "training": lambda: (meta(2, 3, 4, 5), *statistics(), meta(3), meta(3), True),
    "evaluation": lambda: (meta(2, 3, 4, 5), *statistics(), meta(3), meta(3), False),
    "without statistics": lambda: (meta(2, 3, 4, 5), None, None, meta(3), meta(3), True),
    "without weights": lambda: (meta(2, 3, 4, 5), *statistics(), None, None, True),
    "without a graph": lambda: (meta(2, 3, 4, 5, grad=False), *statistics(), None, None, True),
    "a graph of the weight alone": lambda: (meta(2, 3, 4, 5, grad=False), *statistics(), meta(3), None, True),
    "channels alone": lambda: (meta(4, 3), *statistics(), meta(3), meta(3), True),
    "a line": lambda: (meta(4, 3, 7), *statistics(), meta(3), meta(3), True),
    "channels last": lambda: (meta(2, 4, 5, 3).permute(0, 3, 1, 2), *statistics(), meta(3), meta(3), True),
    "of 16 bits, weights of 32": lambda: (
        meta(2, 3, 4, 5, dtype=torch.bfloat16),
        *statistics(),
        meta(3),
        meta(3),
        True,
    ),
}


@pytest.mark.parametrize("function", [F.batch_norm, torch.batch_norm])
@pytest.mark.parametrize("operands", NORMALISED)
def test_batch_normalisation(operands: str, function: Any) -> None:
    given = NORMALISED[operands]()
    if function is torch.batch_norm:
        x, mean, variance, weight, bias, training = given
        given = (x, weight, bias, mean, variance, training, 0.1, 1e-5, False)
    found = compute(Kind.BATCH_NORM, function, given, {})
    expected = function(*given)
    assert_as_torch(found, expected, given)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize(
    "given",
    [
        (meta(1, 3, 1, 1), *statistics(), meta(3), meta(3), True),
        (meta(2, 3, 4, 5), *statistics(), meta(4), meta(3), True),
        (meta(2, 3, 4, 5), *statistics(4), meta(3), meta(3), True),
        (meta(2, 3, 4, 5), None, None, meta(3), meta(3), False),
        (meta(2, 3, 4, 5, grad=False, dtype=torch.int64), *statistics(), None, None, True),
    ],
    ids=[
        "one value a channel",
        "a weight of four channels",
        "statistics of four channels",
        "no statistics",
        "integers",
    ],
)
def test_batch_normalisation_that_torch_refuses_is_refused(given: tuple[Any, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        F.batch_norm(*given)
    with pytest.raises((RuntimeError, ValueError)):
        compute(Kind.BATCH_NORM, F.batch_norm, given, {})
