from collections.abc import Sequence
from typing import Any

def cpu_paths() -> list[str]: ...
def cpu_path() -> str: ...
def cpu_has_bf16() -> bool: ...
def build_info() -> str: ...
def cuda_kernels() -> bool: ...
def relative_attention_forward_bytes(
    qkv: Any, tables: Sequence[Any], layout: tuple[int, int, int], threads: int, /
) -> int: ...
def relative_attention_backward_bytes(
    qkv: Any, tables: Sequence[Any], layout: tuple[int, int, int], threads: int, table_grads: bool, /
) -> int: ...
def relative_attention_forward(
    qkv: Any,
    tables: Sequence[Any],
    layout: tuple[int, int, int],
    scale: float,
    threads: int,
    out: Any,
    softmax: Any,
    workspace: Any,
    /,
) -> None: ...
def relative_attention_backward(
    qkv: Any,
    tables: Sequence[Any],
    layout: tuple[int, int, int],
    scale: float,
    threads: int,
    softmax: Any,
    grad_out: Any,
    grad_qkv: Any,
    table_grads: Sequence[Any],
    workspace: Any,
    /,
) -> None: ...
def channel_saliency(outputs: Any, output_grads: Any, sums: Any, threads: int) -> None: ...

class GradientMoments:
    def __init__(
        self,
        inputs: Sequence[Any],
        output_grads: Sequence[Any],
        groups: int,
        convolution: tuple[int, ...] | None,
        signed: bool,
        threads: int,
    ) -> None: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def depthwise(self) -> bool: ...
    @property
    def taps_first(self) -> bool: ...
    def run(self, workspace: Any, maps: Sequence[Any], weight: Any | None) -> tuple[tuple[float, ...], int]: ...

def moments_state_size(numel: int, signed: bool) -> int: ...
def accumulate_moments(gradient: Any, group: int, signed: bool, threads: int, state: Any) -> None: ...
def finish_moments(
    state: Any, numel: int, groups: int, signed: bool, maps: Sequence[Any]
) -> tuple[tuple[float, ...], int]: ...

code_words: int

def pack_signs(
    pre: Any,
    post: Any | None,
    words: Any,
    activation: int,
    first_sample: int,
    packed_samples: int,
    accumulate: bool,
    threads: int,
) -> None: ...
def count_patterns_by_tags(
    words: Sequence[Any],
    samples: int,
    bits: int,
    patterns: Any,
    ends: Any,
    histograms: Any,
    tags: Any,
    threads: int,
) -> tuple[int, list[int]]: ...
def partition_patterns(
    words: Sequence[Any], samples: int, bits: int, patterns: Any, ends: Any, histograms: Any, threads: int
) -> int: ...
def count_partitions(
    words: Sequence[Any],
    samples: int,
    bits: int,
    patterns: Any,
    ends: Any,
    slots: int,
    keys: Any,
    tags: Any,
    threads: int,
) -> tuple[int, list[int]]: ...
def count_agreements(
    words: Sequence[Any], samples: int, codes: Any, disagreements: Any, out: Any, threads: int
) -> None: ...
def cuda_pack_signs(
    pre: Any,
    post: Any | None,
    words: Any,
    activation: int,
    first_sample: int,
    packed_samples: int,
    accumulate: bool,
    stream: int,
) -> None: ...
def cuda_write_numbers(numbers: Any, out: Any, stream: int) -> None: ...
def cuda_count_workspace(positions: list[int]) -> int: ...
def cuda_count_patterns(words: Sequence[Any], samples: int, counts: Any, workspace: Any, stream: int) -> None: ...
def cuda_has_grouped_moments(device: int) -> bool: ...
def cuda_grouped_moments(
    problems: Any,
    uses: Any,
    ends: Any,
    magnitudes: Any,
    partials: Any,
    problem_count: int,
    first_tile: int,
    end_tile: int,
    half: bool,
    stream: int,
) -> None: ...
def cuda_agreement_workspace(activations: int) -> int: ...
def cuda_count_agreements(words: Sequence[Any], samples: int, out: Any, workspace: Any, stream: int) -> None: ...
