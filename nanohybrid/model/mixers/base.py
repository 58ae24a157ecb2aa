"""The Mixer base class: what a layer computes, and every fact about its kind that other packages need.

A kind of layer is one file with one subclass of Mixer, registered under one character of the layer pattern
(model/mixers/__init__.py). Configuration, loading, saving, counting, memory plans, speed estimates, pruning,
plots and executors read the facts declared here. No other file lists kinds of layers.

T tokens · E hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.mixers.axes import Axes, axis_sizes, is_linear, shape
from nanohybrid.model.mixers.declarations import (
    CpuKernel,
    InnerActivation,
    LayerFields,
    MixerSpec,
    PrunableAxis,
)
from nanohybrid.ops.layout import Layout

PROMISES = ("block_types", "gguf_names", "official", "cpu_kernel", "cuda_graphs", "commits_drafts")
"""What a class does not inherit."""

Fields = TypeVar("Fields", bound=LayerFields)


class Weights(nn.Module):
    """Parameters that share a prefix of the checkpoint. The mixer's forward computes with them."""

    weight: Tensor
    bias: Tensor


class Mixer(nn.Module, ABC, Generic[Fields]):
    """One kind of layer: what it does to the normed residual stream, and the facts about it.

    A two-dimensional parameter `X.weight` becomes the nn.Linear `X`, so that quantization, FP8 and adapters
    find it; every other parameter is registered under its checkpoint name.
    """

    symbol: ClassVar[str]
    """Its character in the layer pattern."""
    label: ClassVar[str]
    """Its name in tables and plots."""
    color: ClassVar[str]
    """Its color in plots and in `nanohybrid inspect`, as #rrggbb."""
    fields: ClassVar[type[LayerFields]] = LayerFields
    """The dataclass of the configuration fields that it reads.

    Fields that HybridConfig lacks become valid for patterns with this kind.
    """
    block_types: ClassVar[tuple[str, ...]] = ()
    """Its names in `layers_block_type` of a `config.json`."""
    gguf_names: ClassVar[Mapping[str, str]] = {}
    """Its parameters' names in llama.cpp's files; a parameter without one cannot be exported."""
    prunable: ClassVar[tuple[PrunableAxis, ...]] = ()
    """The axes that pruning may shorten, beside the hidden size."""
    activation: ClassVar[InnerActivation | None] = None
    """Where importance is measured; needed where `prunable` is not empty."""
    cuda_graphs: ClassVar[bool] = False
    """Whether its decode step reads the layout on the device alone, so that a CUDA graph can record it."""
    commits_drafts: ClassVar[bool] = False
    """Whether it leaves its recurrent states as they are for a layout's speculative sequences and buffers
    their tokens for `commit`. A layer without recurrent states need not: its rows are overwritten by
    position.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """A subclass inherits what it computes, but no promise of what others can do with it: which programs
        know the layer and which kernels run it are answers that each class gives for itself, since its
        forward may differ.
        """
        super().__init_subclass__(**options)
        for promise in PROMISES:
            if promise not in vars(cls):
                setattr(cls, promise, vars(Mixer)[promise])

    def __init__(self, config: Fields) -> None:
        super().__init__()
        self.config: Any = config
        build(self, self.declare(config).parameters, config)

    @classmethod
    @abstractmethod
    def declare(cls, config: Fields) -> MixerSpec:
        """The axes of the parameters, and the cache."""

    @abstractmethod
    def forward(self, x_TE: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        """x_TE -> what is added to the residual stream, [T, E].

        cache: the layer's tensors, read and updated in place at the layout's slots and pages; None in
        training.
        """

    @classmethod
    def check(cls, config: Fields) -> None:
        """Raise ConfigError where this kind cannot be built with `config`."""

    @classmethod
    def official(cls, config: Fields) -> bool:
        """Whether the official `nemotron_h` layout describes this layer completely.

        Where not, the checkpoint is written with model_type "nanohybrid", which other programs refuse.
        """
        return False

    @classmethod
    def gguf_options(cls, config: Fields) -> list[str]:
        """Options in use that llama.cpp's `nemotron_h` does not know, in words."""
        return []

    @classmethod
    def describe(cls, config: Fields) -> str:
        """The layer's sizes on one line, for `nanohybrid inspect`."""
        return ""

    @classmethod
    def residual_outputs(cls, config: Fields) -> set[str]:
        """The matrices that write to the residual stream, by checkpoint name: their rows are the hidden size."""
        return {
            name
            for name, axes in cls.declare(config).parameters.items()
            if is_linear(name, axes) and axes[0] == "hidden_size"
        }

    @classmethod
    def small(cls, config: Fields) -> dict[str, Any]:
        """The fields to change for a small model of the same kind, for checks that need a second copy or a gradient."""
        return {}

    @classmethod
    def takes_drafts(cls, config: Fields) -> bool:
        """Whether speculative decoding can run this kind: rejected draft tokens leave no trace in its cache."""
        recurrent = any(spec.kind == "recurrent" for spec in cls.declare(config).cache.values())
        return cls.commits_drafts or not recurrent

    # ---- estimates, all from above; executors are measured against them in the tests

    @classmethod
    def mixing_flops(cls, config: Fields, tokens: int, position: int) -> int:
        """FLOPs in addition to the linears, for `tokens` tokens of a sequence after `position` earlier ones."""
        return 0

    @classmethod
    def transient_numbers(cls, config: Fields) -> int:
        """Numbers a token that the torch executor holds inside the layer at once.

        As it stands: the outputs of all linears, three times.
        """
        return 3 * linear_outputs(cls, config)

    @classmethod
    def chunk_numbers(cls, config: Fields) -> int:
        """Elements of intermediate recurrent state that kernels hold for each chunk of 128 tokens: the fp32 cache."""
        specs = cls.declare(config).cache.values()
        return sum(
            prod(shape(spec.axes, axis_sizes(config)))
            for spec in specs
            if spec.kind == "recurrent" and spec.dtype is not None
        )

    @classmethod
    def context_numbers(cls, config: Fields, batch: int) -> int:
        """Numbers a token of context that the torch forms hold beside the cache, for a batch of sequences."""
        return 0

    @classmethod
    def draft_numbers(cls, config: Fields, drafts: int) -> int:
        """fp32 numbers that a sequence buffers for its draft tokens until they are accepted or rejected."""
        return 0

    @classmethod
    def saved_bytes(cls, config: Fields, narrow: int) -> int:
        """Bytes a token that the forward saves for the backward, the layer's input aside.

        narrow: bytes of a number that linears read and write. As it stands: inputs and outputs of all
        linears, twice.
        """
        sizes, parameters = axis_sizes(config), cls.declare(config).parameters.items()
        return 2 * narrow * sum(sum(shape(axes, sizes)) for name, axes in parameters if is_linear(name, axes))

    @classmethod
    def initial(cls, config: Fields, name: str, parameter: Tensor, generator: torch.Generator) -> bool:
        """Fill a parameter of this checkpoint name with its initial values, and return whether the kind has a
        rule for it.

        Without a rule, parameters whose name ends in `norm.weight` become 1 and all others are drawn
        from a normal distribution (model/initialize.py).
        """
        return False

    def cpu_kernel(self) -> CpuKernel | None:
        """How the CPU kernels compute this layer, or None if they cannot; the model then runs on torch."""
        return None


def linear_outputs(kind: type[Mixer[Any]], config: Any) -> int:
    """Numbers a token that all linears of a layer write."""
    sizes = axis_sizes(config)
    return sum(
        shape(axes, sizes)[0]
        for name, axes in kind.declare(config).parameters.items()
        if is_linear(name, axes)
    )


def linear(inputs: int, outputs: int) -> nn.Linear:
    """nn.Linear with an uninitialized weight on the default device (`with torch.device("meta")` included) and no bias."""
    module = nn.Linear(inputs, outputs, bias=False, device="meta")
    module.weight = nn.Parameter(torch.empty(outputs, inputs))
    return module


def embedding(entries: int, width: int) -> nn.Embedding:
    """nn.Embedding in the same way; given its weight, for torch would draw one, which on the meta device loads torch._dynamo (a second)."""
    return nn.Embedding.from_pretrained(torch.empty(entries, width), freeze=False)


def build(module: nn.Module, parameters: Mapping[str, Axes], config: Any) -> None:
    """Give `module` uninitialized parameters of the declared names and shapes."""
    sizes = axis_sizes(config)
    for name, axes in parameters.items():
        *path, leaf = name.split(".")
        dimensions = shape(axes, sizes)
        if is_linear(name, axes):
            module.add_module(path[0], linear(dimensions[1], dimensions[0]))
            continue
        owner: nn.Module = module
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, Weights())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.empty(dimensions)))
