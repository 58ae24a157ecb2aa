"""AdamW with weight decay on matrices only, and gradient clipping.

Norm weights, A_log, dt_bias, D and biases have no weight decay: zero is not a natural value for them.
Optimizer states are fp32, as the master weights are.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nanohybrid.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and gradient clipping."""

    RENAMED: ClassVar[dict[str, str]] = {"clip": "max_grad_norm"}

    learning_rate: float = 3e-3
    """Peak learning rate of the schedule."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.1
    """Applied to matrices only."""
    max_grad_norm: float = 1.0
    """The gradient of all parameters together is scaled down to this norm."""

    def __post_init__(self) -> None:
        if not (
            self.learning_rate >= 0 and self.weight_decay >= 0 and self.max_grad_norm > 0 and self.epsilon > 0
        ):
            raise ConfigError(
                "optimizer: learning_rate and weight_decay must not be negative, max_grad_norm and epsilon "
                "must be positive"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"optimizer: beta1 {self.beta1} and beta2 {self.beta2} must be in [0, 1)")


def has_weight_decay(model: nn.Module) -> dict[str, bool]:
    """Name of each trainable parameter -> whether weight decay applies to it."""
    return {
        name: parameter.ndim >= 2 for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The fused AdamW of a model's trainable parameters (Loshchilov and Hutter 2019)."""
    named, decays = dict(model.named_parameters()), has_weight_decay(model)
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


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use `learning_rate` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients so that their common norm is at most `max_norm`; returns the norm before, an fp32
    scalar."""
    return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_norm)
