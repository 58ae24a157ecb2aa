"""Precision, applied to a model from outside: fp32, bf16 by autocast, or bf16 with the matrix products of inner layers in FP8.

Weights stay fp32 in every case; the model's code knows of none of this. The FP8 recipe itself: nanohybrid/ops/fp8/reference.py.
Here is only where it applies: to every linear of the layers, except in the first and last `bf16_layers` of them, and never to
the head or the embedding, which are the most sensitive and a small part of the work.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nanohybrid.errors import ConfigError
from nanohybrid.ops import fp8

Mode = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class PrecisionConfig:
    """In which numbers the matrix products of a run are computed."""

    mode: Mode = "bf16"
    bf16_layers: int = 2
    """With fp8: layers at either end that stay in bf16."""
    fp8_until: float = 1.0
    """With fp8: share of the steps after which the rest of the run is bf16."""

    def __post_init__(self) -> None:
        if self.mode not in ("fp32", "bf16", "fp8"):
            raise ConfigError(f"precision: mode is {self.mode!r}, the modes are fp32, bf16 and fp8")
        if self.bf16_layers < 0 or not 0 <= self.fp8_until <= 1:
            raise ConfigError(
                "precision: bf16_layers must not be negative, and fp8_until is a share from 0 to 1"
            )

    def mode_at(self, step: int, steps: int) -> Mode:
        """The mode of one step: a function of the step alone, so that a resumed run changes where the whole one does."""
        return "bf16" if self.mode == "fp8" and step >= self.fp8_until * steps else self.mode


class FP8Linear(nn.Linear):
    """A linear whose three matrix products have FP8 operands. It shares the weight of the one it stands in for."""

    def __init__(self, original: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight, self.bias = original.weight, original.bias

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        return fp8.linear(input, self.weight, self.bias)


def fp8_modules(layers: nn.ModuleList, bf16_layers: int) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each linear that runs in FP8, with the module that holds it and its name there."""
    for layer in list(layers)[bf16_layers : len(layers) - bf16_layers]:
        for parent in layer.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    yield parent, name, child


@contextmanager
def fp8_linears(layers: nn.ModuleList, bf16_layers: int) -> Iterator[int]:
    """Inside, the inner layers' linears compute in FP8; yields how many. Parameters keep their names and identity."""
    found = list(fp8_modules(layers, bf16_layers))
    if not found:
        raise ConfigError(
            f"precision: with {len(layers)} layers and bf16_layers {bf16_layers} nothing is left for fp8: lower bf16_layers"
        )
    for parent, name, linear in found:
        setattr(parent, name, FP8Linear(linear))
    try:
        yield len(found)
    finally:
        for parent, name, linear in found:
            setattr(parent, name, linear)


def autocast(mode: Mode, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward: matrix products in bf16 unless the mode is fp32."""
    return nullcontext() if mode == "fp32" else torch.autocast(device.type, torch.bfloat16)
