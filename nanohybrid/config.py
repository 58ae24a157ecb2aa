"""What a model is: one frozen dataclass. A layer pattern is a string of `M` (Mamba-2), `*` (attention), `-` (MLP).

Field names are those of the official `config.json`, so that a reader of either knows the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from nanohybrid.errors import ConfigError

MAMBA, ATTENTION, MLP = "M", "*", "-"
KINDS = {MAMBA: "Mamba-2", ATTENTION: "attention", MLP: "MLP"}


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
        _check_time_steps(self)
        if ATTENTION in self.pattern:
            _check_divides(self, "num_attention_heads", "num_key_value_heads")
            _check_rotary(self)
        if MAMBA in self.pattern:
            _check_divides(self, "mamba_num_heads", "n_groups")
        if self.mlp_activation not in ("relu2", "swiglu"):
            raise ConfigError(f'mlp_activation is "{self.mlp_activation}": known are relu2 and swiglu')

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
        raise ConfigError(f"the layer pattern is {pattern!r}: it must be a string of M, * and -")
    for position, character in enumerate(pattern):
        if character not in KINDS:
            raise ConfigError(
                f'the layer pattern has "{character}" at position {position}: known are M (Mamba-2), * (attention), - (MLP)'
            )


_USED_BY = {
    "num_attention_heads": ATTENTION, "num_key_value_heads": ATTENTION, "head_dim": ATTENTION, "intermediate_size": MLP,
    "mamba_num_heads": MAMBA, "mamba_head_dim": MAMBA, "n_groups": MAMBA, "ssm_state_size": MAMBA, "conv_kernel": MAMBA,
}  # fmt: skip


def _check_numbers(config: HybridConfig) -> None:
    token_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int":
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{field.name} is {value!r}: it must be a whole number")
            if (
                value < (0 if field.name in token_ids else 1)
                and _USED_BY.get(field.name, config.pattern[0]) in config.pattern
            ):
                raise ConfigError(f"{field.name} is {value}: it must be positive")
        elif field.type == "float" and (
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ):
            raise ConfigError(f"{field.name} is {value!r}: it must be a finite number")


def _check_time_steps(config: HybridConfig) -> None:
    low, high, floor = config.time_step_min, config.time_step_max, config.time_step_floor
    if not (0 < low <= high and floor > 0):
        raise ConfigError(
            f"time_step_min is {low}, time_step_max {high}, time_step_floor {floor}: all positive, min no more than max"
        )
    limit = config.time_step_limit
    pair = (
        isinstance(limit, tuple)
        and len(limit) == 2
        and all(isinstance(bound, int | float) for bound in limit)
    )
    if not pair or not limit[0] <= limit[1]:
        raise ConfigError(f"time_step_limit is {limit}: it must be two numbers, the smaller first")


def _check_rotary(config: HybridConfig) -> None:
    theta = config.rope_theta
    if theta is None:
        return
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ConfigError(f"rope_theta is {theta!r}: it must be a positive number, or none for no rotation")
    if config.head_dim % 2:
        raise ConfigError(f"head_dim is {config.head_dim}: rotary positions need an even number")


def _check_divides(config: HybridConfig, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ConfigError(
            f"{whole} is {getattr(config, whole)}: it must be a multiple of {part} = {getattr(config, part)}"
        )
