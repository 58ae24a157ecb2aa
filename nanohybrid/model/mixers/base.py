"""Builds a layer's parameters from its declaration, so that a shape is written down once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nanohybrid.config import HybridConfig
from nanohybrid.model.mixers.axes import Axes, Declaration, axis_sizes, shape
from nanohybrid.ops.layout import Layout


class Weights(nn.Module):
    """A name in the checkpoint with parameters under it; what is computed with them stands in the mixer's forward."""

    weight: Tensor
    bias: Tensor


class Mixer(nn.Module, ABC):
    """What a layer does to the normed residual stream: Mamba-2, attention or MLP. Built from `declare(config)`.

    A two-dimensional `X.weight` becomes nn.Linear `X`, so that whatever acts on linears from outside finds it; every other
    parameter lies at its checkpoint name.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        build(self, self.declare(config).parameters, config)

    @staticmethod
    @abstractmethod
    def declare(config: HybridConfig) -> Declaration:
        """The axes of this mixer's parameters, and its state."""

    @abstractmethod
    def forward(self, x_TE: Tensor, layout: Layout, state: dict[str, Tensor] | None) -> Tensor:
        """x_TE -> what is added to the residual stream, [T, E]; reads and writes `state` at the layout's slots and pages."""


def linear(inputs: int, outputs: int) -> nn.Linear:
    """nn.Linear with an uninitialized weight on the default device (`with torch.device("meta")` included) and no bias."""
    module = nn.Linear(inputs, outputs, bias=False, device="meta")
    module.weight = nn.Parameter(torch.empty(outputs, inputs))
    return module


def embedding(entries: int, width: int) -> nn.Embedding:
    """nn.Embedding in the same way; given its weight, for torch would draw one, which on the meta device loads torch._dynamo (a second)."""
    return nn.Embedding.from_pretrained(torch.empty(entries, width), freeze=False)


def build(module: nn.Module, parameters: Mapping[str, Axes], config: HybridConfig) -> None:
    """Give `module` uninitialized parameters of the declared names and shapes."""
    sizes = axis_sizes(config)
    for name, axes in parameters.items():
        *path, leaf = name.split(".")
        dimensions = shape(axes, sizes)
        if len(path) == 1 and leaf == "weight" and len(dimensions) == 2:
            module.add_module(path[0], linear(dimensions[1], dimensions[0]))
            continue
        owner: nn.Module = module
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, Weights())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.empty(dimensions)))
