"""What a model is: one frozen dataclass. A layer pattern is a string of `M` (Mamba-2), `*` (attention), `-` (MLP).

Field names are those of the official `config.json`, so that a reader of either knows the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from nanohybrid.errors import ConfigError, shown

MAMBA, ATTENTION, MLP = "M", "*", "-"
KINDS = {MAMBA: "Mamba-2", ATTENTION: "attention", MLP: "MLP"}
FLOAT32_SMALLEST, FLOAT32_LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127
"""The smallest normal and the largest number of float32."""
INT_LARGEST = 2**31 - 1
MATRIX_LARGEST = 2**40
"""Elements of one tensor; torch's own arithmetic on sizes ends at 2^63 bytes."""
LAYERS_LARGEST = 20_000


@dataclass(frozen=True)
class HybridConfig:
    """The shape of a hybrid (or, by its pattern, dense or pure Mamba-2) language model.

    Defaults are the Nemotron Nano 2 family's (paper, section 2.1 and Table 1). Raises ConfigError where fields contradict
    one another; only the fields that the pattern uses are judged.
    """

    pattern: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    # attention
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    rope_theta: float | None = None  # None: no position embedding, as in the whole Nano 2 family
    qk_norm: bool = False
    # Mamba-2
    mamba_num_heads: int = 128
    mamba_head_dim: int = 80
    n_groups: int = 8
    ssm_state_size: int = 128
    conv_kernel: int = 4
    chunk_size: int = (
        128  # kept for the file: our chunks are always 128 tokens, and results do not depend on it
    )
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    # MLP
    mlp_activation: Literal["relu2", "swiglu"] = "relu2"
    # the whole
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    bos_token_id: int = 1
    eos_token_id: int = 12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        limit: object = self.time_step_limit
        if isinstance(limit, list):  # from JSON or TOML
            object.__setattr__(self, "time_step_limit", tuple(limit))
        _check_pattern(self.pattern)
        _check_numbers(self)
        _check_sizes(self)
        _check_time_steps(self)
        if ATTENTION in self.pattern:
            _check_divides(self, "num_attention_heads", "num_key_value_heads")
            _check_rotary(self)
        if MAMBA in self.pattern:
            _check_divides(self, "mamba_num_heads", "n_groups")
        if self.mlp_activation not in ("relu2", "swiglu"):
            raise ConfigError(f'mlp_activation is "{shown(self.mlp_activation)}": known are relu2 and swiglu')

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of one mixer each: the length of the pattern."""
        return len(self.pattern)

    @property
    def mamba_inner_size(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    def replace(self, **changes: Any) -> HybridConfig:
        """This configuration with some fields changed; checked anew."""
        return replace(self, **changes)


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"the layer pattern is {shown(pattern)}: it must be a string of M, * and -")
    if len(pattern) > LAYERS_LARGEST:
        raise ConfigError(
            f"the layer pattern has {len(pattern):,} layers: at most {LAYERS_LARGEST:,} are allowed"
        )
    for position, character in enumerate(pattern):
        if character not in KINDS:
            raise ConfigError(
                f'the layer pattern has "{character}" at position {position}: known are M (Mamba-2), * (attention), - (MLP)'
            )


_USED_BY = {
    "num_attention_heads": ATTENTION, "num_key_value_heads": ATTENTION, "head_dim": ATTENTION, "intermediate_size": MLP,
    "mamba_num_heads": MAMBA, "mamba_head_dim": MAMBA, "n_groups": MAMBA, "ssm_state_size": MAMBA, "conv_kernel": MAMBA,
}  # fmt: skip


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAY_BE_ZERO = ("initializer_range",)


def check_float32(name: str, value: object, positive: bool = False, fix: str = "take one of them") -> None:
    """Raise ConfigError where a number is none that float32 holds: every executor computes with it in float32.

    Refused are NaN, infinities, numbers beyond 3.4e38, and numbers below 1.2e-38, which float32 rounds towards zero.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ConfigError(f"{name} is {shown(value)}: it must be a finite number")
    if value < 0 or (positive and value == 0):
        raise ConfigError(f"{name} is {shown(value)}: it must be {'positive' if positive else 'at least 0'}")
    if value > FLOAT32_LARGEST or 0 < value < FLOAT32_SMALLEST:
        raise ConfigError(f"{name} is {shown(value)}: float32 holds numbers from 1.2e-38 to 3.4e38; {fix}")


def _check_numbers(config: HybridConfig) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int":
            _check_int(field.name, value, _USED_BY.get(field.name, config.pattern[0]) in config.pattern)
        elif field.type == "float":
            check_float32(field.name, value, positive=field.name not in _MAY_BE_ZERO)
        elif field.type == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{field.name} is {shown(value)}: it must be true or false")


def _check_int(name: str, value: object, used: bool) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}: it must be a whole number")
    if used and value < (0 if name in _TOKEN_IDS else 1):
        raise ConfigError(f"{name} is {shown(value)}: it must be positive")
    if used and value > INT_LARGEST:
        raise ConfigError(f"{name} is {shown(value)}: it must be at most {INT_LARGEST:,}")


def _check_sizes(config: HybridConfig) -> None:
    """Raise ConfigError where a matrix, or a layer's state of one sequence, has more than MATRIX_LARGEST elements."""
    inner = config.mamba_inner_size
    mixed = inner + 2 * config.n_groups * config.ssm_state_size
    sizes = {
        ("vocab_size", "hidden_size"): ("", config.vocab_size, config.hidden_size),
        ("intermediate_size", "hidden_size"): (MLP, config.intermediate_size, config.hidden_size),
        ("num_attention_heads", "head_dim", "hidden_size"): (
            ATTENTION, config.num_attention_heads * config.head_dim, config.hidden_size,
        ),
        ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "hidden_size"): (
            MAMBA, inner + mixed + config.mamba_num_heads, config.hidden_size,
        ),
        ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"): (
            MAMBA, mixed, config.conv_kernel,
        ),
        ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"): (MAMBA, inner, config.ssm_state_size),
    }  # fmt: skip
    for names, (mixer, rows, columns) in sizes.items():
        if mixer in config.pattern and rows * columns > MATRIX_LARGEST:
            said = ", ".join(f"{name} {getattr(config, name):,}" for name in names)
            raise ConfigError(
                f"{said} make a tensor of {rows:,} x {columns:,}: at most {MATRIX_LARGEST:,} elements"
            )


def _check_time_steps(config: HybridConfig) -> None:
    low, high = config.time_step_min, config.time_step_max
    if low > high:
        raise ConfigError(
            f"time_step_min is {low} and time_step_max {high}: the first must be no more than the second"
        )
    limit: object = config.time_step_limit
    if not (isinstance(limit, tuple) and len(limit) == 2) or not all(map(_is_number, limit)):
        raise ConfigError(f"time_step_limit is {shown(limit)}: it must be two numbers, the smaller first")
    lower, upper = limit
    check_float32("the lower bound of time_step_limit", lower)
    if upper != math.inf:
        check_float32("the upper bound of time_step_limit", upper, fix="Infinity means no limit")
    if not lower <= upper:
        raise ConfigError(f"time_step_limit is {shown(limit)}: it must be two numbers, the smaller first")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rotary(config: HybridConfig) -> None:
    if config.rope_theta is None:
        return
    check_float32("rope_theta", config.rope_theta, positive=True)
    if config.head_dim % 2:
        raise ConfigError(f"head_dim is {config.head_dim}: rotary positions need an even number")


def _check_divides(config: HybridConfig, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ConfigError(
            f"{whole} is {getattr(config, whole)}: it must be a multiple of {part} = {getattr(config, part)}"
        )
