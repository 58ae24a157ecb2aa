"""AdamW, with weight decay where it belongs: on matrices.

Decay pulls a number towards zero. For a matrix that is a mild prior; for a norm's scale, A_log, dt_bias, D or a bias zero means
nothing in particular, so these are left alone. States are fp32, as the master weights are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanohybrid.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings and the gradient clip."""

    learning_rate: float = 3e-3
    """The peak of the schedule."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""

    def __post_init__(self) -> None:
        if not (self.learning_rate >= 0 and self.weight_decay >= 0 and self.clip > 0 and self.epsilon > 0):
            raise ConfigError(
                "optimizer: learning_rate and weight_decay must not be negative, clip and epsilon must be positive"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(
                f"optimizer: beta1 {self.beta1} and beta2 {self.beta2} must be from 0 to below 1"
            )


def decayed(model: nn.Module) -> dict[str, bool]:
    """For each trainable parameter, by name: does weight decay apply to it?"""
    return {
        name: parameter.ndim >= 2 for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of a model's trainable parameters, fused into one pass over memory."""
    named, decays = dict(model.named_parameters()), decayed(model)
    groups = [
        {
            "params": [named[name] for name, decay in decays.items() if decay],
            "weight_decay": config.weight_decay,
        },
        {"params": [named[name] for name, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradient(model: nn.Module, largest: float) -> Tensor:
    """Scale the gradient down to norm `largest` where it is longer; returns its norm before."""
    return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], largest)
