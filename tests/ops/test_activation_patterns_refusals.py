"""What the ops of activation patterns refuse, in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lswag_fast import _C, InputError
from lswag_fast.ops import activation_patterns as ap


def test_fake_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(InputError):
        ap.pack_signs(torch.empty(4, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ap.pack_signs(torch.zeros(3, 2, dtype=torch.int32)), "float32, bfloat16 or float16, got int32"),
        (lambda: ap.pack_signs(torch.zeros(())), r"\[S, ...\]"),
        (lambda: ap.pack_signs([1.0]), "DLPack array, got list"),
        (lambda: ap.pack_signs(torch.zeros(3, 2), samples=4), "from 0 to S = 3, got 4"),
        (lambda: ap.pack_signs(torch.zeros(3, 2), first_sample=1022), "1022 to 1025"),
        (lambda: ap.pack_signs(torch.zeros(3, 2), words=torch.zeros(1, 3, dtype=torch.int64)), "P = 2"),
        (lambda: ap.pack_signs(torch.zeros(3, 2, device="meta")), "on the CPU or on a CUDA device, got meta"),
        (lambda: ap.activate_and_pack(torch.zeros(3, 2), "tanh"), "relu, relu6, gelu"),
        (lambda: ap.pack_signs(torch.eye(3).to_sparse()), "dense strided tensor, got layout sparse_coo"),
        (lambda: ap.pack_signs(np.ones((3, 2), ">f4")), "byte order"),
        (lambda: ap.pack_signs(np.array(["a"])), "DLPack array"),
        (lambda: ap.count_patterns([torch.zeros(1, 3, dtype=torch.int64, device="meta")], 5), "on the CPU or"),
        (lambda: ap.count_distinct([torch.zeros(1, 3, dtype=torch.int64)], 65), "W >= 2"),
        (lambda: ap.count_distinct([torch.zeros(1, 3)], 5), "int64"),
        (lambda: ap.hamming_kernel([], 0), "from 1 to 1024"),
        (lambda: ap.activation_patterns([]), "at least one"),
        (lambda: ap.activation_patterns(torch.zeros(3, 5)), r"got one tensor; write \[tensor\]"),
        (lambda: ap.activation_patterns([torch.zeros(3, 1), torch.zeros(4, 1)]), "S = 3, 4"),
        (lambda: ap.activation_patterns([torch.zeros(1, 5)]), "2 to 1024"),
        (lambda: ap.activation_patterns([torch.zeros(5, 5)], pattern_samples=6), "pattern_samples"),
    ],
)
def test_bad_input_is_refused_in_words(call, words: str):
    with pytest.raises(InputError, match=words):
        call()


def test_a_device_without_kernels_is_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_C, "cuda_kernels", lambda: False)
    with FakeTensorMode():
        activation, words = torch.zeros(3, 2, device="cuda"), torch.zeros(1, 3, dtype=torch.int64, device="cuda")
        with pytest.raises(InputError, match=r"activation is on cuda:0, but this build holds no CUDA kernels; install"):
            ap.pack_signs(activation)
        with pytest.raises(InputError, match=r"words\[0\] is on cuda:0, .* or move the tensor to the CPU"):
            ap.count_patterns([words], 5)


def test_tensors_on_several_devices_are_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_C, "cuda_kernels", lambda: True)
    with FakeTensorMode():
        here, there = (torch.zeros(1, 2, dtype=torch.int64, device=device) for device in ("cpu", "cuda"))
        with pytest.raises(InputError, match="on one device, got cpu and cuda:0"):
            ap.hamming_kernel([here, there], 5)
        with pytest.raises(InputError, match="on the activation's device cuda:0, got cpu"):
            ap.pack_signs(torch.zeros(3, 2, device="cuda"), words=here)


class Elsewhere:
    """An array that says it lies on a CUDA device of some number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.number

    def __dlpack__(self, **_: object) -> object:
        return torch.zeros(3, 2).__dlpack__()


def test_cuda_kernels_refuse_what_lies_elsewhere():
    words = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="read tensors on a CUDA device, got DLPack device type 1"):
        _C.cuda_count_patterns([words], 5, words, words, 0)
    with pytest.raises(ValueError, match="read tensors on a CUDA device, got DLPack device type 1"):
        _C.cuda_pack_signs(Elsewhere(0), None, words, 0, 0, 3, False, 0)


def test_too_many_positions_for_one_count_are_refused():
    if not _C.cuda_kernels():
        with pytest.raises(ValueError, match="holds no CUDA kernels"):
            _C.cuda_count_workspace([5])
        return
    assert _C.cuda_count_workspace([5, 0, 1025]) >= 2 * 3 * 1024
    with pytest.raises(ValueError, match="fewer than 2\\^31 positions can be counted"):
        _C.cuda_count_workspace([2**30, 2**30])
