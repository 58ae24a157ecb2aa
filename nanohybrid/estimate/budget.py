"""Memory of a model at inference, and which model shapes fit a budget.

    bytes = weights + batch (context x keys and values of a token + states of a sequence) + activations of one
    step

The terms come from the declarations of the layers (estimate/footprint.py). The paper's budget is 19.66 GiB
for a 128k context in bf16: an A10G's 22.06 GiB, less 5 % for the framework and 1.3 GiB for a vision encoder
(devices.py). The 9B takes 18.69 GiB of it, plus 0.33 GiB for the activations of a step.

Upper bound of the activations of a step of T tokens: the outputs of all linears of the widest layer, twice
(before and after elementwise operations); one state for each chunk of 128 tokens; the residual stream twice;
and the fp32 logits of the last tokens. It holds where kernels run: on a GPU, and on a CPU in bf16, int8 and
int4. In fp32 and fp16 the torch ops run, which need more: the engine's bound of the widest layer
(estimate/serving.py), and in attention a contiguous copy of the keys and values of a context, repeated for
each query head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeVar

import torch

from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.estimate.footprint import Footprint
from nanohybrid.estimate.linear_shapes import Matrix, matrices_of
from nanohybrid.estimate.serving import transient
from nanohybrid.estimate.units import GIB, amount
from nanohybrid.ops.quantized import FORMATS, holds, stored_bytes
from nanohybrid.ops.sizes import CHUNK

T = TypeVar("T")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLAIN = ("fp32", "fp16")  # torch ops run in these on a CPU, no kernels of this package
QUANTIZED = FORMATS  # of the layers' matrices and the head; embeddings, norms, keys and values stay bf16
STEP = 2048  # tokens of one step of a serving engine


@dataclass(frozen=True)
class Memory:
    """Bytes of a model at inference, by purpose."""

    weights: int
    kv: int
    state: int
    reserve: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.state + self.reserve

    def as_dict(self) -> dict[str, int]:
        return {
            "weights": self.weights,
            "kv": self.kv,
            "state": self.state,
            "reserve": self.reserve,
            "total": self.total,
        }


@dataclass(frozen=True)
class Budget:
    """Memory limit in bytes for inference on `batch` sequences of `context` tokens in `dtype`.

    step: tokens of a step whose activations are counted; 0 counts no activations. quantize_head: whether a
    quantized dtype is that of an untied head too.
    """

    bytes: int
    context: int = 4096
    batch: int = 1
    dtype: str = "bf16"
    step: int = 0
    quantize_head: bool = True

    def __post_init__(self) -> None:
        if min(self.bytes, self.context, self.batch) < 1:
            raise ConfigError("a budget's bytes, context and batch must be positive")
        if self.dtype not in (*DTYPES, *QUANTIZED):
            raise ConfigError(
                f"a budget's dtype is {self.dtype!r}, known are {', '.join((*DTYPES, *QUANTIZED))}"
            )

    def memory(self, config: HybridConfig) -> Memory:
        """The memory of a model of this shape."""
        footprint = Footprint.of(config, DTYPES.get(self.dtype, torch.bfloat16))
        each = self.batch * self.context
        return Memory(
            weights=weight_bytes(config, self.dtype, self.quantize_head),
            kv=each * footprint.kv_bytes_per_token,
            state=self.batch * footprint.state_bytes_per_sequence,
            reserve=activation_bytes(config, min(self.step, each), self.batch, self.dtype, self.context)
            if self.step
            else 0,
        )

    @property
    def plain(self) -> Budget:
        """This budget for weights that are not quantized."""
        return replace(self, dtype="bf16") if self.dtype in QUANTIZED else self

    @property
    def kind(self) -> torch.dtype:
        """The dtype of activations and of weights that are not quantized."""
        return DTYPES[self.plain.dtype]

    def fits(self, config: HybridConfig) -> bool:
        """Whether a model of this shape fits."""
        return self.memory(config).total <= self.bytes

    def __str__(self) -> str:
        return f"{amount(self.bytes)} at context {self.context:,}, batch {self.batch}, {self.dtype}"


def matrix_bytes(matrix: Matrix, dtype: str) -> int:
    """Bytes of one linear with its scales; in bf16 if the format does not support its width."""
    rows, columns = matrix
    if dtype in QUANTIZED and holds(dtype, columns):
        return stored_bytes(dtype, rows, columns)
    return rows * columns * DTYPES.get(dtype, torch.bfloat16).itemsize


def weight_bytes(config: HybridConfig, dtype: str, quantize_head: bool = True) -> int:
    """Bytes of all weights."""
    format = dtype if dtype in QUANTIZED else None
    kind = DTYPES.get(dtype, torch.bfloat16)
    return Footprint.of(config, kind, format=format, quantize_head=quantize_head).weight_bytes


def activation_bytes(
    config: HybridConfig, tokens: int, batch: int, dtype: str = "bf16", context: int = 0
) -> int:
    """Upper bound in bytes of a step's activations:

    `tokens` tokens of `batch` sequences of `context` tokens.
    """
    if dtype in PLAIN:
        return (
            transient(config, tokens) + gathered_bytes(config, batch, context) + batch * config.vocab_size * 4
        )
    kind = DTYPES.get(dtype, torch.bfloat16)
    widest = 0
    for mixer in set(config.mixers):
        outputs = sum(rows for rows, _ in matrices_of(mixer, config))
        chunks = (
            ceil(tokens / CHUNK)
            * mixer.chunk_numbers(config)
            * torch.promote_types(kind, torch.float32).itemsize
        )
        widest = max(widest, 2 * tokens * kind.itemsize * outputs + chunks)
    return widest + 2 * tokens * config.hidden_size * kind.itemsize + batch * config.vocab_size * 4


def gathered_bytes(config: HybridConfig, batch: int, context: int) -> int:
    """fp32 bytes that the torch ops of a layer need in addition to the cache, over a context of `context`
    tokens.
    """
    return 4 * context * max(mixer.context_numbers(config, batch) for mixer in set(config.mixers))


def within(
    budget: Budget, parent: HybridConfig, shapes: Iterable[tuple[T, HybridConfig]]
) -> tuple[list[tuple[T, HybridConfig, Memory]], int]:
    """The shapes that fit, each with its source and its memory, and the number of shapes that do not fit.

    Raises InputError if no shape fits.
    """
    fitting: list[tuple[T, HybridConfig, Memory]] = []
    smallest, least, rejected = parent, budget.memory(parent).total, 0
    for made_from, config in shapes:
        memory = budget.memory(config)
        if memory.total < least:
            smallest, least = config, memory.total
        if memory.total > budget.bytes:
            rejected += 1
        else:
            fitting.append((made_from, config, memory))
    if not fitting:
        raise too_small(budget, smallest)
    return fitting, rejected


def too_small(budget: Budget, smallest: HybridConfig) -> InputError:
    """The error for a budget in which no shape fits; it names the need of the smallest shape."""
    need = budget.memory(smallest).total
    digits = 2 if need >= GIB / 10 else 6
    near = f"--budget-gib {ceil(need / GIB * 10**digits) / 10**digits:.{digits}f}"
    widths = f"hidden {smallest.hidden_size}, FFN {smallest.intermediate_size}"
    shape = f"{smallest.num_hidden_layers} layers, {widths}"
    return InputError(
        f"no shape of the grid fits {budget}: the smallest takes {amount(need)} ({shape}); nearest "
        f"{near}, or a wider grid"
    )
