"""How much memory a model needs while it works, and what a budget leaves room for.

    bytes = weights + batch (context x keys and values of a token + states of a sequence)

from what the layers declare (model/footprint.py). The paper's budget: an A10G's 22.06 GiB, less 5 % for the framework and 1.3 GiB for
a vision encoder, is 19.66 GiB for a 128 k context in bf16; the 9B takes 18.69 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.model.footprint import GIB, Footprint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Memory:
    """Bytes of a model at work, by what they hold."""

    weights: int
    kv: int
    state: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.state

    def as_dict(self) -> dict[str, int]:
        return {"weights": self.weights, "kv": self.kv, "state": self.state, "total": self.total}


@dataclass(frozen=True)
class Budget:
    """Memory that a model may take, at work on `batch` sequences of `context` tokens in `dtype`."""

    bytes: int
    context: int = 4096
    batch: int = 1
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if min(self.bytes, self.context, self.batch) < 1:
            raise ConfigError("a budget's bytes, context and batch must be positive")
        if self.dtype not in DTYPES:
            raise ConfigError(f"a budget's dtype is {self.dtype!r}, known are {', '.join(DTYPES)}")

    def memory(self, config: HybridConfig) -> Memory:
        """What a model of this shape takes."""
        footprint = Footprint.of(config, DTYPES[self.dtype])
        each = self.batch * self.context
        return Memory(footprint.weight_bytes, each * footprint.kv_bytes_per_token, self.batch * footprint.state_bytes_per_sequence)

    def fits(self, config: HybridConfig) -> bool:
        """Whether a model of this shape stays within."""
        return self.memory(config).total <= self.bytes

    def __str__(self) -> str:
        size = f"{self.bytes / GIB:.2f} GiB" if self.bytes >= GIB / 10 else f"{self.bytes / 2**20:.2f} MiB"
        return f"{size} at context {self.context:,}, batch {self.batch}, {self.dtype}"
