"""Who is compared, in what memory and over which lengths; and the same contest in small, for a machine without a GPU.

In small, all widths, the state and all lengths are divided by a factor f, the numbers of layers are not. Weights, and the keys, values
and states of a sequence, then each shrink by f^2 (an FFN by f in each of its two widths, a cache by f in heads and f in length), so that
a cap divided by f^2 holds about as many sequences as the whole one, and the same part of a step is spent on each.
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

STEP_TOKENS = 512  # of a step, where memory is what decides: the engine's usual 2,048 cost the 9B two of eight sequences at 8k/16k
HYBRID, DENSE = "nano-9b-v2", "qwen3-8b"
SCALES = (1, 2, 4, 8)  # what divides every width of both
WIDTHS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "mamba_num_heads", "n_groups",
    "ssm_state_size",
)  # fmt: skip


@dataclass(frozen=True)
class Mix:
    """So many tokens in and out for each sequence; `name` is the true lengths', whatever the scale."""

    name: str
    inputs: int
    outputs: int

    @property
    def context(self) -> int:
        return self.inputs + self.outputs

    @property
    def mean(self) -> int:
        """The length at which a step is as long as all steps are in the mean."""
        return self.inputs + self.outputs // 2


@dataclass(frozen=True)
class Contender:
    """A model in a precision: bf16, int8 or int4."""

    name: str
    config: HybridConfig
    dtype: str


PAPER = (
    Mix("1k/1k", 1024, 1024),
    Mix("8k/1k", 8192, 1024),
    Mix("8k/16k", 8192, 16_384),
    Mix("128k/1k", 131_072, 1024),
)


def mixes(names: list[str] | None = None, scale: int = 1) -> list[Mix]:
    """The paper's four mixes of lengths, or some of them, scaled down. Raises InputError for a name that is none of them."""
    known = {mix.name: mix for mix in PAPER}
    for name in names or []:
        if name not in known:
            raise InputError(f"there is no mix {name!r}: known are {', '.join(known)}")
    return [
        Mix(mix.name, mix.inputs // scale, mix.outputs // scale)
        for mix in PAPER
        if names is None or mix.name in names
    ]


def contenders(dtypes: list[str], scale: int = 1) -> list[Contender]:
    """The Transformer in bf16, then the hybrid in each precision. Raises InputError where a format has no form for a width."""
    wide = [(DENSE, "bf16"), *((HYBRID, dtype) for dtype in dtypes)]
    result = [Contender(name, scaled(preset(name), scale), dtype) for name, dtype in wide]
    for one in result:
        for rows, columns in quantizable(one.config).values() if one.dtype != "bf16" else ():
            if not holds(one.dtype, columns):
                raise InputError(
                    f"{one.dtype} has no form for the {rows} x {columns} matrices of {one.name} at scale {scale}: take another, or int8"
                )
    return result


def scaled(config: HybridConfig, scale: int) -> HybridConfig:
    """The configuration with every width divided, and room for the longest mix."""
    if scale not in SCALES:
        raise InputError(
            f"the scale is {scale}: it must divide every width of both models, as {', '.join(map(str, SCALES))} do"
        )
    narrow = {name: max(1, getattr(config, name) // scale) for name in WIDTHS}
    return config.replace(**narrow, max_position_embeddings=max(mix.context for mix in PAPER))


def cap(gib: float, scale: int = 1) -> int:
    """The memory in bytes: what is beside the interpreter shrinks with the square of the scale."""
    whole = int(gib * GIB)
    if whole <= PROCESS:
        raise InputError(f"the cap is {gib:g} GiB, and the process alone takes {PROCESS / GIB:g}")
    return PROCESS + (whole - PROCESS) // scale**2


def step_tokens(scale: int = 1) -> int:
    """Tokens that the engine takes at once from a prompt."""
    return max(CHUNK, STEP_TOKENS // scale)
