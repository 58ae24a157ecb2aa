"""How a model's parameters begin (Mamba-2's and Nemotron-H's rules)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nanohybrid.config import HybridConfig

RESIDUAL_OUTPUTS = ("out_proj.weight", "o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialize(module: nn.Module, config: HybridConfig, generator: torch.Generator) -> None:
    """Fill every parameter in place, in the order of their names' appearance; the same seed gives the same model.

    generator: of the CPU. What is elsewhere is drawn there too, one tensor at a time, for each device's generator draws numbers of its own.
    """
    for name, parameter in module.named_parameters():
        if parameter.device.type == "cpu":
            fill(parameter, name, config, generator)
        else:
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            fill(drawn, name, config, generator)
            parameter.copy_(drawn)


def fill(parameter: Tensor, name: str, config: HybridConfig, generator: torch.Generator) -> None:
    """One parameter by its checkpoint name."""
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        parameter.fill_(1.0)
    elif name.endswith("A_log"):
        parameter.copy_(torch.empty(parameter.shape).uniform_(1, 16, generator=generator).log())
    elif name.endswith("dt_bias"):
        parameter.copy_(_dt_bias(parameter.shape, config, generator))
    elif name.endswith(("conv1d.weight", "conv1d.bias")):
        bound = config.conv_kernel**-0.5
        parameter.uniform_(-bound, bound, generator=generator)
    else:
        std = config.initializer_range
        if config.rescale_prenorm_residual and name.endswith(RESIDUAL_OUTPUTS):
            std /= math.sqrt(config.num_hidden_layers)
        parameter.normal_(0.0, std, generator=generator)


def _dt_bias(shape: torch.Size, config: HybridConfig, generator: torch.Generator) -> Tensor:
    """The inverse softplus of step sizes spread evenly in their logarithm between time_step_min and time_step_max."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = torch.empty(shape).uniform_(low, high, generator=generator).exp().clamp(min=config.time_step_floor)
    return dt + torch.log(-torch.expm1(-dt))
