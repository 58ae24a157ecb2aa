"""Initial values of a model's parameters (Mamba-2's and Nemotron-H's rules)."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from nanohybrid.config import HybridConfig
from nanohybrid.model.mixers import MIXERS

_MIXER = re.compile(r"(?:.*\.)?layers\.(\d+)\.mixer\.(.+)")


@torch.no_grad()
def initialize(module: nn.Module, config: HybridConfig, generator: torch.Generator) -> None:
    """Fill every parameter in place, in the order in which their names appear; the same seed gives the same
    model.

    generator: of the CPU. Parameters on other devices are drawn there too, one tensor at a time, since each
    device's generator draws numbers of its own.
    """
    for name, parameter in module.named_parameters():
        if parameter.device.type == "cpu":
            fill(parameter, name, config, generator)
        else:
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            fill(drawn, name, config, generator)
            parameter.copy_(drawn)


def fill(parameter: Tensor, name: str, config: HybridConfig, generator: torch.Generator) -> None:
    """Fill one parameter by its checkpoint name: by its mixer's own rule where it has one, else norms 1,
    matrices normal.

    The matrices that write to the residual stream are divided by the square root of the number of layers.
    """
    inside = _MIXER.fullmatch(name)
    mixer = MIXERS[config.pattern[int(inside[1])]] if inside else None
    leaf = inside[2] if inside else name
    if mixer is not None and mixer.initial(config, leaf, parameter, generator):
        return
    if name.endswith(("norm.weight", "norm_f.weight")):
        parameter.fill_(1.0)
        return
    std = config.initializer_range
    if config.rescale_prenorm_residual and mixer is not None and leaf in mixer.residual_outputs(config):
        std /= math.sqrt(config.num_hidden_layers)
    parameter.normal_(0.0, std, generator=generator)
