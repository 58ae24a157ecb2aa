"""The MLP mixer: squared ReLU without a gate in Nano 2 (paper, section 2.1), or SwiGLU as in Qwen3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from nanohybrid.errors import ConfigError, shown
from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.mixers.axes import Axes
from nanohybrid.model.mixers.base import Mixer
from nanohybrid.model.mixers.declarations import (
    CpuKernel,
    InnerActivation,
    LayerFields,
    MixerSpec,
    PrunableAxis,
    width,
)
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.squared_relu import squared_relu


@dataclass(frozen=True, kw_only=True)
class MLPFields(LayerFields):
    """What an MLP reads of the configuration."""

    intermediate_size: int = width()
    mlp_activation: Literal["relu2", "swiglu"] = "relu2"


FRACTIONS = (1.0, 0.875, 0.75, 0.6875, 0.625, 0.5625, 0.5)


class MLP(Mixer[MLPFields]):
    """down(relu(up x)^2), or down(silu(gate x) * up x). It has no cache."""

    symbol = "-"
    label = "MLP"
    color = "#7d8590"
    fields = MLPFields
    block_types = ("mlp",)
    gguf_names: ClassVar[dict[str, str]] = {
        "gate_proj.weight": "ffn_gate.weight", "up_proj.weight": "ffn_up.weight", "down_proj.weight": "ffn_down.weight",
    }  # fmt: skip
    prunable = (
        PrunableAxis(
            "intermediate_size", "--intermediate-size", "FFN neurons", multiple=True, fractions=FRACTIONS
        ),
    )
    cuda_graphs = True
    activation = InnerActivation("down_proj", "input", ("intermediate_size",), writer="down_proj")

    up_proj: nn.Linear
    down_proj: nn.Linear
    gate_proj: nn.Linear

    @classmethod
    def declare(cls, config: MLPFields) -> MixerSpec:
        parameters: dict[str, Axes] = {
            "up_proj.weight": ("intermediate_size", "hidden_size"),
            "down_proj.weight": ("hidden_size", "intermediate_size"),
        }
        if config.mlp_activation == "swiglu":
            parameters["gate_proj.weight"] = ("intermediate_size", "hidden_size")
        return MixerSpec(parameters)

    def forward(self, x_TE: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        if self.config.mlp_activation == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x_TE)) * self.up_proj(x_TE))
        return self.down_proj(squared_relu(self.up_proj(x_TE)))

    @classmethod
    def check(cls, config: MLPFields) -> None:
        if config.mlp_activation not in ("relu2", "swiglu"):
            raise ConfigError(
                f'mlp_activation is "{shown(config.mlp_activation)}": known are relu2 and swiglu'
            )

    @classmethod
    def official(cls, config: MLPFields) -> bool:
        return config.mlp_activation == "relu2"

    @classmethod
    def gguf_options(cls, config: MLPFields) -> list[str]:
        return ["a gated MLP (mlp_activation = swiglu)"] if config.mlp_activation == "swiglu" else []

    @classmethod
    def describe(cls, config: MLPFields) -> str:
        return f"{config.intermediate_size:,}, {config.mlp_activation}"

    @classmethod
    def small(cls, config: MLPFields) -> dict[str, Any]:
        return dict(intermediate_size=min(config.intermediate_size, 96))

    @classmethod
    def transient_numbers(cls, config: MLPFields) -> int:
        return 2 * config.intermediate_size

    @classmethod
    def saved_bytes(cls, config: MLPFields, narrow: int) -> int:
        return narrow * (
            config.hidden_size + config.intermediate_size * (4 if config.mlp_activation == "swiglu" else 2)
        )

    def cpu_kernel(self) -> CpuKernel | None:
        if self.config.mlp_activation == "swiglu":
            return CpuKernel("gated_mlp", ("gate_proj", "up_proj", "down_proj"))
        return CpuKernel("mlp", ("up_proj", "down_proj"))
