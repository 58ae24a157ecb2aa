"""Rotary positions (RoPE, Su et al. 2021) and their scalings to longer contexts.

A position p turns the pair (x_i, x_{i + P/2}) of a head by the angle p f_i, where f_i = theta^(-2i/P). A
scaling changes the frequencies f once, before any token is seen:

    linear  f_i / factor                                                  (Chen et al. 2023)
    llama3  f_i where the wave is short, f_i / factor where it is long, a mean between    (Llama 3.1)
    yarn    the same by the number of turns within the original context; cos and sin grow by a factor of
            attention                                                     (Peng et al. 2023)

Scalings whose frequencies follow the length of the sequence (`dynamic`, `longrope`) are refused: cached keys
were turned by other frequencies than those of later tokens.

T tokens · H heads · P head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nanohybrid.errors import ConfigError, shown
from nanohybrid.model.mixers.checks import check_float32, check_int

NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings",),
}
"""Each kind of scaling and the fields that it needs beside `factor`."""
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
BY_LENGTH = ("dynamic", "longrope", "su")
BETA_FAST, BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies of rotary positions are changed; field names are those of `config.json`.

    Raises ConfigError for an unknown kind, a missing field, and numbers out of range.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    """Tokens of the context before scaling."""
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    """What cos and sin are multiplied by; None: 0.1 ln(factor) + 1, or the ratio by the two mscales."""
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Whether the bounds of yarn's ramp are rounded to whole dimensions."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RopeScaling:
        """A scaling from its fields by name. Raises ConfigError, also for fields that the kind does not
        have.
        """
        kind = values.get("rope_type")
        if not isinstance(kind, str) or kind not in NEEDED:
            raise ConfigError(f"rope_type is {shown(kind)}: known are {', '.join(NEEDED)}")
        allowed = {"rope_type", "factor", *NEEDED[kind], *OPTIONAL.get(kind, ())}
        unknown = sorted(set(values) - allowed)
        if unknown:
            raise ConfigError(f"rope_scaling has {shown(unknown[0])}, which {kind} does not: remove it")
        if values.get("factor") is None:
            raise ConfigError(f"factor of rope_scaling is missing: {kind} needs it")
        return cls(**{name: value for name, value in values.items() if value is not None})

    def __post_init__(self) -> None:
        if not isinstance(self.rope_type, str) or self.rope_type not in NEEDED:
            raise ConfigError(f"rope_type is {shown(self.rope_type)}: known are {', '.join(NEEDED)}")
        for name in NEEDED[self.rope_type]:
            if getattr(self, name) is None:
                raise ConfigError(f"{name} of rope_scaling is missing: {self.rope_type} needs it")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast",
                     "beta_slow"):  # fmt: skip
            if getattr(self, name) is not None:
                check_float32(f"{name} of rope_scaling", getattr(self, name), positive=True)
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_float32(f"{name} of rope_scaling", getattr(self, name))
        if self.factor < 1:
            raise ConfigError(f"factor of rope_scaling is {self.factor}: it must be at least 1")
        if self.original_max_position_embeddings is not None:
            check_int("original_max_position_embeddings", self.original_max_position_embeddings)
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"truncate of rope_scaling is {shown(self.truncate)}: it must be true or false")
        self._check_order("low_freq_factor", "high_freq_factor", self.low_freq_factor, self.high_freq_factor)
        self._check_order("beta_slow", "beta_fast", self.slow, self.fast)

    def _check_order(self, low: str, high: str, lower: float | None, higher: float | None) -> None:
        if lower is not None and higher is not None and lower >= higher:
            raise ConfigError(
                f"{low} of rope_scaling is {lower} and {high} is {higher}: the first must be smaller"
            )

    @property
    def fast(self) -> float:
        """Turns within the original context from which on yarn leaves a frequency as it is."""
        return BETA_FAST if self.beta_fast is None else self.beta_fast

    @property
    def slow(self) -> float:
        """Turns within the original context up to which yarn divides a frequency by the factor."""
        return BETA_SLOW if self.beta_slow is None else self.beta_slow

    @property
    def attention_scale(self) -> float:
        """What cos and sin are multiplied by: so scores are multiplied by its square."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def as_dict(self) -> dict[str, Any]:
        """The fields that this kind has and that are set, by name, as in `config.json`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        own = ("rope_type", "factor", *NEEDED[self.rope_type], *OPTIONAL.get(self.rope_type, ()))
        return {
            name: named[name]
            for name in own
            if named[name] is not None and not (name == "truncate" and named[name])
        }


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians a token of each pair of a head, [P/2] in float32 on the host, after the scaling.

    theta: the base, above 1 where the scaling is yarn. The operations and their order are those of
    transformers, so the numbers are the same to the last bit.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / head_dim
    plain = 1.0 / (theta**exponents)
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    return (_llama3 if scaling.rope_type == "llama3" else _yarn)(head_dim, theta, plain, scaling)


def _llama3(head_dim: int, theta: float, plain: Tensor, scaling: RopeScaling) -> Tensor:
    context, low, high = (
        scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor,
    )  # fmt: skip
    assert context is not None and low is not None and high is not None
    waves = 2 * math.pi / plain
    scaled = torch.where(waves > context / low, plain / scaling.factor, plain)
    smooth = (context / waves - low) / (high - low)
    between = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    return torch.where((waves >= context / high) & (waves <= context / low), between, scaled)


def _yarn(head_dim: int, theta: float, plain: Tensor, scaling: RopeScaling) -> Tensor:
    powers = theta ** (torch.arange(0, head_dim, 2, device="cpu").to(torch.float32) / head_dim)
    first, last = (_turning(turns, head_dim, theta, scaling) for turns in (scaling.fast, scaling.slow))
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    unscaled = 1 - torch.clamp((pairs - first) / (last - first), 0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - unscaled) + 1.0 / powers * unscaled


def _turning(turns: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """The dimension whose pair turns this often within the original context."""
    assert scaling.original_max_position_embeddings is not None
    context = scaling.original_max_position_embeddings
    return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def rotary_angles(positions_T: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [T, P] of position times frequency [P/2], repeated for both halves, times `scale`."""
    angles = positions_T.to(torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    cos_TP, sin_TP = angles.cos(), angles.sin()
    return (cos_TP, sin_TP) if scale == 1.0 else (cos_TP * scale, sin_TP * scale)


def rotate(x_THP: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotate the pair (x_i, x_{i + P/2}) of each head by its angle; in the dtype of x."""
    first, second = x_THP.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_THP * cos_TP[:, None].to(x_THP.dtype)) + (turned * sin_TP[:, None].to(x_THP.dtype))
