"""Mixed precision: fp32, bf16 autocast, or bf16 with the matrix products of the inner layers in FP8 (paper,
section 2).

Weights stay fp32 in every mode, and the model's code does not depend on the mode. The FP8 recipe is in
ops/fp8/reference.py. It applies to the linears of all layers except the first and last `bf16_layers`. The
embedding and the head never use it: they are the most sensitive parts and a small share of the work.
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
    """Precision of the matrix products."""

    mode: Mode = "bf16"
    """fp32, bf16 (autocast), or fp8 (inner layers in FP8, the rest in bf16)."""
    bf16_layers: int = 2
    """With fp8: the number of first and of last layers that stay in bf16."""
    fp8_until: float = 1.0
    """With fp8: fraction of the steps after which the run continues in bf16."""

    def __post_init__(self) -> None:
        if self.mode not in ("fp32", "bf16", "fp8"):
            raise ConfigError(f"precision: mode is {self.mode!r}; it must be fp32, bf16 or fp8")
        if self.bf16_layers < 0 or not 0 <= self.fp8_until <= 1:
            raise ConfigError(
                "precision: bf16_layers must not be negative, and fp8_until must be from 0 to 1"
            )

    def mode_at(self, step: int, steps: int) -> Mode:
        """The mode of one step. It depends on the step alone, so a resumed run switches at the same step."""
        return "bf16" if self.mode == "fp8" and step >= self.fp8_until * steps else self.mode


class FP8Linear(nn.Linear):
    """A linear whose three matrix products have FP8 operands.

    It shares the weight of the linear that it replaces.
    """

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
    """Each linear that runs in FP8, with its parent module and its name in the parent."""
    for layer in list(layers)[bf16_layers : len(layers) - bf16_layers]:
        for module in layer.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    yield module, name, child


@contextmanager
def fp8_linears(layers: nn.ModuleList, bf16_layers: int) -> Iterator[int]:
    """Within the context, the linears of the inner layers compute in FP8; yields their number.

    Parameters keep their names and identity. Raises ConfigError where `bf16_layers` leaves no layer for FP8.
    """
    found = list(fp8_modules(layers, bf16_layers))
    if not found:
        raise ConfigError(
            f"precision: with {len(layers)} layers and bf16_layers {bf16_layers} no layer is left for fp8: "
            "lower bf16_layers"
        )
    for module, name, linear in found:
        setattr(module, name, FP8Linear(linear))
    try:
        yield len(found)
    finally:
        for module, name, linear in found:
            setattr(module, name, linear)


def autocast(mode: Mode, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass: bf16 autocast, or nothing in fp32."""
    return nullcontext() if mode == "fp32" else torch.autocast(device.type, torch.bfloat16)
