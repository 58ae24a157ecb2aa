"""The MLP mixer: squared ReLU without a gate in the Nano 2 family; SwiGLU as an option, which makes it Qwen3's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nanohybrid.config import HybridConfig
from nanohybrid.model.mixers.axes import Axes, Declaration
from nanohybrid.model.mixers.base import Mixer
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.squared_relu import squared_relu


class MLP(Mixer):
    """down(relu(up x)^2), or down(silu(gate x) up x). It remembers nothing."""

    up_proj: nn.Linear
    down_proj: nn.Linear
    gate_proj: nn.Linear

    @staticmethod
    def declare(config: HybridConfig) -> Declaration:
        parameters: dict[str, Axes] = {
            "up_proj.weight": ("ffn", "embedding"),
            "down_proj.weight": ("embedding", "ffn"),
        }
        if config.mlp_activation == "swiglu":
            parameters["gate_proj.weight"] = ("ffn", "embedding")
        return Declaration(parameters, states={})

    def forward(self, x_TE: Tensor, layout: Layout, state: dict[str, Tensor] | None) -> Tensor:
        if self.config.mlp_activation == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x_TE)) * self.up_proj(x_TE))
        return self.down_proj(squared_relu(self.up_proj(x_TE)))
