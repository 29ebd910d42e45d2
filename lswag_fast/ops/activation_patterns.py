"""Activation patterns: signs of activations packed across samples, and exact counts over them.

A pattern belongs to one neuron (one position of one activation): S bits, bit n is 1 where sample n is > 0. The number
of distinct patterns is Psi of L-SWAG (Casarin, Escalera, Lanz, CVPR 2025, equation 7); the agreements of samples are
the kernel matrix of NWOT (Mellor et al., ICML 2021).

Tensors on the CPU are taken by C++, those on a CUDA device by CUDA C++ on torch's current stream there. Only a function
that returns Python's numbers waits for the device; the others can be captured in a CUDA graph.

Packed words are int64 [W, P]: W = ceil(S / 64) rows, P positions in the row-major order of the activation's shape
without its sample axis, whatever its strides. Bit n % 64 of row n // 64 is sample n's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C, backends
from ..errors import InputError
from ..memory import Empty, empty_like
from .arrays import as_tensor, refusals

ACTIVATIONS = ("relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish")
"""What `activate_and_pack` computes; gelu is the exact one, by erf."""

MAX_SAMPLES = 1024
"""Of a pattern."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Up to here a tag for each of the 2^S patterns, partition by partition, takes less time than hash sets.
_TAG_SAMPLES = 26
_TAG_BITS = 13  # 2^13 tags of a partition are 16 KB
_PARALLEL_BITS = 4  # partitions enough to share among threads
_PARTITION = 1024  # positions, so that a hash set takes some 24 KB
_TABLE_BYTES = 2**32  # of address space, for the tables of all threads


@dataclass(frozen=True)
class PatternCounts:
    """Distinct patterns of all activations together and of each, and the positions of each."""

    union: int
    per_layer: tuple[int, ...]
    positions: tuple[int, ...]


def pack_signs(
    activation: Tensor, *, words: Tensor | None = None, first_sample: int = 0, samples: int | None = None
) -> Tensor:
    """Packs the signs of a post-activation across samples.

    Args:
        activation: [S, ...], float32, bfloat16 or float16, a tensor or any DLPack array; any strides.
        words: the words of the samples before `first_sample` of a larger batch, to which these are added in place.
            Where they have too few rows for the new samples, a longer copy is returned.
        first_sample: the bit of the activation's sample 0.
        samples: pack only the first so many samples of `activation`, 0 to S.

    Returns:
        words int64 [W, P], W = ceil((first_sample + samples) / 64), on the activation's device.

    Raises:
        InputError: the dtype, device, shape or one of the numbers cannot be used.
    """
    activation = _tensor(activation, "activation")
    count = _sample_count(activation, samples, first_sample)
    words, accumulate = _words_for(activation, words, first_sample, count)
    _pack(activation, None, words, 0, first_sample, count, accumulate)
    return words


def activate_and_pack(
    pre: Tensor, kind: str, *, samples: int | None = None, empty: Empty = torch.empty
) -> tuple[Tensor, Tensor]:
    """Applies an activation function and packs the signs of its result, in one pass.

    Args:
        pre: pre-activation [S, ...], float32, bfloat16 or float16, a tensor or any DLPack array.
        kind: one of `ACTIVATIONS`. Computed in float32; gelu to 2.4e-7, where 1 + erf in float32 loses 1.2e-6.
        samples: pack only the first so many samples; the function is applied to all.
        empty: where both results are put.

    Returns:
        The post-activation, of the dtype and shape of `pre`, and the words int64 [W, P] of exactly its values > 0.

    Raises:
        InputError: the dtype, device or shape cannot be used, or `kind` is none of `ACTIVATIONS`.
    """
    if kind not in ACTIVATIONS:
        raise InputError(f"kind must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")
    pre = _tensor(pre, "pre")
    count = _sample_count(pre, samples, 0)
    post = empty_like(pre, empty)
    words, _ = _words_for(pre, None, 0, count, empty)
    _pack(pre, post, words, 1 + ACTIVATIONS.index(kind), 0, count, False)
    return post, words


def count_patterns(words: Sequence[Tensor], samples: int) -> PatternCounts:
    """Counts the distinct patterns of several activations, exactly, over their first `samples` samples.

    Args:
        words: of each activation, as `pack_signs` gives them; int64 [W, P], P may differ.
        samples: S, from 1 to 64 * W.

    Raises:
        InputError: words of another dtype or shape, on several devices, or with fewer rows than S samples need; on a
            CUDA device, 2^31 positions or more.
    """
    words = _checked_words(words, samples)
    positions = tuple(w.shape[1] for w in words)
    if sum(positions) == 0:
        return PatternCounts(0, tuple(0 for _ in words), positions)
    if words[0].is_cuda:
        union, *per_layer = count_patterns_device(words, samples).tolist()
        return PatternCounts(union, tuple(per_layer), positions)
    with refusals():
        by_tags = samples <= _TAG_SAMPLES and len(words) < 2**16
        union, per_layer = (_count_by_tags if by_tags else _count_by_hash)(words, samples)
    return PatternCounts(union, tuple(per_layer), positions)


def count_patterns_device(words: Sequence[Tensor], samples: int) -> Tensor:
    """Counts as `count_patterns` does, without waiting for a CUDA device.

    Takes words, at least one tensor of them, and raises as `count_patterns` does.

    Returns:
        int64 [1 + activations] on the words' device: the distinct patterns of all activations together, then of each.
    """
    words = _checked_words(words, samples)
    if not words:
        raise InputError("words is empty; give the words of at least one activation")
    if not words[0].is_cuda:
        counts = count_patterns(words, samples)
        return torch.tensor([counts.union, *counts.per_layer], dtype=torch.int64)
    try:
        numel = _C.cuda_count_workspace([w.shape[1] for w in words])
    except ValueError as error:
        raise InputError(f"{error}, got {sum(w.shape[1] for w in words)}") from error
    device = words[0].device
    out = torch.empty(1 + len(words), dtype=torch.int64, device=device)
    workspace = torch.empty(numel, dtype=torch.int64, device=device)
    _C.cuda_count_patterns(words, samples, out, workspace, _stream(device))
    return out


def count_distinct(words: Sequence[Tensor], samples: int) -> int:
    """Returns the number of distinct patterns of all activations together; see `count_patterns`."""
    return count_patterns(words, samples).union


def hamming_kernel(words: Sequence[Tensor], samples: int) -> Tensor:
    """Returns the number of positions at which each two samples agree: int64 [S, S], the positions on its diagonal.

    That is NWOT's kernel matrix, N_A less the Hamming distance of two samples' binary codes, before its logarithm of
    the determinant. Takes words and raises as `count_patterns` does; the result is on their device.
    """
    words = _checked_words(words, samples)
    if words and words[0].is_cuda:
        device = words[0].device
        out = torch.empty(samples, samples, dtype=torch.int64, device=device)
        space = torch.empty(_C.cuda_agreement_workspace(len(words)), dtype=torch.int64, device=device)
        _C.cuda_count_agreements(words, samples, out, space, _stream(device))
        return out
    threads = torch.get_num_threads()
    out = torch.empty(samples, samples, dtype=torch.int64)
    codes = _workspace(threads * words_per_pattern(samples) * 64 * _C.code_words)
    with refusals():
        _C.count_agreements(words, samples, codes, _workspace(threads * samples * samples), out, threads)
    return out


def activation_patterns(activations: Sequence[Tensor], *, pattern_samples: int | None = None) -> PatternCounts:
    """Counts the distinct activation patterns of a network (Psi is the `union`), exactly.

    Args:
        activations: post-activations [S, ...] with the same S, 2 to 1024, as `pack_signs` takes them.
        pattern_samples: count over the first so many samples, 2 to S; None: all.

    Raises:
        InputError: an activation cannot be used, S differs between them or is out of range.
    """
    if isinstance(activations, Tensor):
        raise InputError("activations is a sequence of tensors [S, ...], got one tensor; write [tensor]")
    tensors = [_tensor(a, f"activations[{i}]") for i, a in enumerate(activations)]
    if not tensors:
        raise InputError("activations is empty; give at least one post-activation [S, ...]")
    sizes = sorted({len(t) for t in tensors})
    if len(sizes) > 1:
        raise InputError(f"activations must share their sample axis 0, got S = {', '.join(map(str, sizes))}")
    samples = sizes[0] if pattern_samples is None else pattern_samples
    if not 2 <= samples <= sizes[0] <= MAX_SAMPLES:
        raise InputError(
            f"patterns need 2 to {MAX_SAMPLES} samples and pattern_samples from 2 to S, "
            f"got S = {sizes[0]}, pattern_samples = {pattern_samples}"
        )
    return count_patterns([pack_signs(t, samples=samples) for t in tensors], samples)


def words_per_pattern(samples: int) -> int:
    """Returns W, the int64 words of a pattern of S samples."""
    return -(-samples // 64)


def _pack(
    pre: Tensor, post: Tensor | None, words: Tensor, activation: int, first_sample: int, count: int, accumulate: bool
) -> None:
    with refusals():
        if pre.is_cuda:
            stream = _stream(pre.device)
            _C.cuda_pack_signs(pre, post, words, activation, first_sample, count, accumulate, stream)
        else:
            threads = torch.get_num_threads()
            _C.pack_signs(pre, post, words, activation, first_sample, count, accumulate, threads)


def _stream(device: torch.device) -> int:
    handle: int = torch.cuda.current_stream(device).cuda_stream
    return handle


def _count_by_tags(words: list[Tensor], samples: int) -> tuple[int, list[int]]:
    threads = torch.get_num_threads()
    bits = max(samples - _TAG_BITS, min(samples, _PARALLEL_BITS))
    kept = _workspace(-(-sum(w.shape[1] for w in words) // 4))
    ends, histograms = _workspace(len(words) << bits), _workspace(threads << bits)
    tags = _workspace(-(-(threads << (samples - bits)) // 4))
    return _C.count_patterns_by_tags(words, samples, bits, kept, ends, histograms, tags, threads)


def _count_by_hash(words: list[Tensor], samples: int) -> tuple[int, list[int]]:
    threads = torch.get_num_threads()
    width = words_per_pattern(samples)
    total = sum(w.shape[1] for w in words)
    bits = min(13, max(0, (total // _PARTITION).bit_length()))
    patterns = _workspace(total * width)
    ends = _workspace(len(words) << bits)
    slots = _C.partition_patterns(words, samples, bits, patterns, ends, _workspace(threads << bits), threads)
    # Only as much of the tables as the sets grow into is ever touched, and so backed by memory. Where one partition is
    # so large, most patterns are the same, and those of the others are few: fewer threads cost little.
    threads = max(1, min(threads, _TABLE_BYTES // (slots * (8 * width + 4))))
    keys, tags = _workspace(threads * slots * width), _workspace(threads * slots // 2)
    return _C.count_partitions(words, samples, bits, patterns, ends, slots, keys, tags, threads)


def _workspace(numel: int) -> Tensor:
    return torch.empty(numel, dtype=torch.int64)


def _tensor(array: object, name: str) -> Tensor:
    tensor = as_tensor(array, name)
    if tensor.dtype not in _DTYPES:
        raise InputError(f"{name} must be float32, bfloat16 or float16, got {str(tensor.dtype).removeprefix('torch.')}")
    _check_device(tensor.device, name)
    if tensor.dim() == 0 or tensor.dim() > 8 or tensor.shape[0] == 0:
        raise InputError(f"{name} must be [S, ...] with S >= 1 and at most 8 axes, got {list(tensor.shape)}")
    return tensor


def _check_device(device: torch.device, name: str) -> None:
    kernels = backends.implementation("activation_patterns", device.type)
    if kernels is None:
        raise InputError(f"{name} must be on the CPU or on a CUDA device, got {device}")
    if kernels == "cuda" and not _C.cuda_kernels():
        raise InputError(
            f"{name} is on {device}, but this build holds no CUDA kernels; install lswag_fast again where nvcc is "
            "found, or move the tensor to the CPU"
        )


def _sample_count(activation: Tensor, samples: int | None, first_sample: int) -> int:
    whole = activation.shape[0]
    count = whole if samples is None else samples
    if not 0 <= count <= whole:
        raise InputError(f"samples must be from 0 to S = {whole}, got {samples}")
    if first_sample < 0 or first_sample + count > MAX_SAMPLES:
        raise InputError(f"samples {first_sample} to {first_sample + count} are outside 0 to {MAX_SAMPLES}")
    return count


def _words_for(
    activation: Tensor, words: Tensor | None, first_sample: int, count: int, empty: Empty = torch.empty
) -> tuple[Tensor, bool]:
    """Returns the words to write for `count` samples, and whether the kernel has to keep the bits they hold."""
    if words is not None and words.device != activation.device:
        raise InputError(f"words must be on the activation's device {activation.device}, got {words.device}")
    positions = activation.numel() // activation.shape[0]
    rows = words_per_pattern(first_sample + count)
    if words is None:
        partly = first_sample > 0 or count < activation.shape[0]
        words = empty((rows, positions), dtype=torch.int64, device=activation.device)
        return words.zero_() if partly else words, partly
    if words.dtype != torch.int64 or words.dim() != 2 or words.shape[1] != positions or not words.is_contiguous():
        raise InputError(
            f"words must be contiguous int64 [W, P] with the activation's P = {positions}, "
            f"got {words.dtype} {list(words.shape)}"
        )
    if len(words) < rows:
        words = torch.cat([words, words.new_zeros(rows - len(words), positions)])
    return words, True


def _checked_words(words: Sequence[Tensor], samples: int) -> list[Tensor]:
    if not 1 <= samples <= MAX_SAMPLES:
        raise InputError(f"samples must be from 1 to {MAX_SAMPLES}, got {samples}")
    words = [as_tensor(w, f"words[{i}]") for i, w in enumerate(words)]
    for i, w in enumerate(words):
        if w.dtype != torch.int64 or w.dim() != 2 or w.shape[0] < words_per_pattern(samples):
            raise InputError(
                f"words[{i}] must be int64 [W, P] with W >= {words_per_pattern(samples)} for {samples} samples, "
                f"got {w.dtype} {list(w.shape)}"
            )
        if i == 0:
            _check_device(w.device, "words[0]")
        if w.device != words[0].device:
            raise InputError(f"words must be on one device, got {words[0].device} and {w.device}")
    return [w.contiguous() for w in words]
