"""What `bench compare` compares: two models, a memory limit and workloads, at full size or scaled down for a
CPU.

The baseline is a Transformer in bf16. The candidates are a hybrid of the same size in bf16 and in a quantized
format. The workloads are the input and output lengths of the paper's inference benchmark (Nemotron Nano 2,
arXiv 2508.14444).

Scaling divides all widths, the SSM state size and all lengths by a factor f. The number of layers stays. The
bytes of the weights and of each sequence's cache then shrink by f^2 (an FFN shrinks by f in both of its
widths, a KV cache by f in heads and by f in length). The memory limit is divided by f^2 too, so about as many
sequences fit as at full size, and each part of a step takes about the same share of its time.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.estimate.serving import PROCESS
from nanohybrid.estimate.units import GIB
from nanohybrid.model.quantized import quantizable
from nanohybrid.ops.quantized import holds
from nanohybrid.ops.sizes import CHUNK
from nanohybrid.presets import preset

# Tokens of a step. With the engine's default of 2,048 the activations cost the 9B two of its eight sequences
# at 8k/16k.
MAX_NUM_BATCHED_TOKENS = 512
HYBRID, DENSE = "nano-9b-v2", "qwen3-8b"
SCALES = (1, 2, 4, 8)  # factors that divide every width of both models
WIDTHS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "mamba_num_heads", "n_groups", "ssm_state_size",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Input and output tokens of each sequence (ISL/OSL).

    `name` gives the lengths at full size, at every scale.
    """

    name: str
    input_tokens: int
    output_tokens: int

    @property
    def context(self) -> int:
        """Tokens of a finished sequence."""
        return self.input_tokens + self.output_tokens

    @property
    def mean_context(self) -> int:
        """Mean context length, in tokens, over the decode steps of a sequence."""
        return self.input_tokens + self.output_tokens // 2


@dataclass(frozen=True)
class Candidate:
    """A model of the comparison and the format of its weights: bf16, int8 or int4."""

    name: str
    config: HybridConfig
    dtype: str


PAPER = (
    Workload("1k/1k", 1024, 1024),
    Workload("8k/1k", 8192, 1024),
    Workload("8k/16k", 8192, 16_384),
    Workload("128k/1k", 131_072, 1024),
)


def workloads(names: list[str] | None = None, scale: int = 1) -> list[Workload]:
    """The paper's four workloads, or those in `names`, with lengths divided by `scale`.

    Raises InputError for an unknown name.
    """
    known = {workload.name: workload for workload in PAPER}
    for name in names or []:
        if name not in known:
            raise InputError(f"unknown workload {name!r}; known workloads: {', '.join(known)}")
    return [
        Workload(workload.name, workload.input_tokens // scale, workload.output_tokens // scale)
        for workload in PAPER
        if names is None or workload.name in names
    ]


def candidates(dtypes: list[str], scale: int = 1) -> list[Candidate]:
    """The baseline (the Transformer in bf16), then the hybrid in each of `dtypes`, with widths divided by
    `scale`.

    Raises InputError for a scale that is not in SCALES, and for a format that does not support a matrix
    width.
    """
    wide = [(DENSE, "bf16"), *((HYBRID, dtype) for dtype in dtypes)]
    result = [Candidate(name, scaled(preset(name), scale), dtype) for name, dtype in wide]
    for one in result:
        for rows, columns in quantizable(one.config).values() if one.dtype != "bf16" else ():
            if not holds(one.dtype, columns):
                raise InputError(
                    f"{one.dtype} does not support the {rows} x {columns} matrices of {one.name} "
                    f"at scale {scale}; use another scale, or int8"
                )
    return result


def scaled(config: HybridConfig, scale: int) -> HybridConfig:
    """`config` with every width divided by `scale` and a context that holds the longest workload at full
    size.

    Raises InputError for a scale that is not in SCALES.
    """
    if scale not in SCALES:
        raise InputError(
            f"scale {scale} does not divide every width of both models; use one of"
            f" {', '.join(map(str, SCALES))}"
        )
    narrow = {name: max(1, getattr(config, name) // scale) for name in WIDTHS}
    return config.replace(**narrow, max_position_embeddings=max(workload.context for workload in PAPER))


def memory_limit(gib: float, scale: int = 1) -> int:
    """The memory limit in bytes at `scale`, from the limit in GiB at full size.

    PROCESS (the interpreter and its libraries) does not scale; the rest is divided by scale^2.
    Raises InputError if the limit does not exceed PROCESS.
    """
    whole = int(gib * GIB)
    if whole <= PROCESS:
        raise InputError(
            f"the memory limit is {gib:g} GiB, but the process alone takes {PROCESS / GIB:g} GiB"
        )
    return PROCESS + (whole - PROCESS) // scale**2


def max_num_batched_tokens(scale: int = 1) -> int:
    """Most tokens that the engine computes in one step."""
    return max(CHUNK, MAX_NUM_BATCHED_TOKENS // scale)
