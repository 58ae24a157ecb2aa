"""Weight-only quantization, applied to a model from outside: the linears of the mixers, and a head of its
own.

Embeddings, norms, convolutions and what makes the steps (A_log, D, dt_bias) stay as they are; so does a head
that is the embeddings. A linear whose rows the format has no form for stays too, and its name is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.model.mixers.axes import is_linear
from nanohybrid.model.spec import param_specs
from nanohybrid.ops import quantized

HEAD = "lm_head.weight"


class QuantizedLinear(nn.Module):
    """Stands where an nn.Linear stood, its weight as codes and scales (ops/quantized/formats.py).

    For inference: the weight has no gradient, its input has.

    codes: [out_features, ...]; scales: [out_features, groups]. Casting the module moves them between devices
    and no more.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.format = quantized.format_of(codes)
        self.out_features, width = codes.shape
        self.in_features = 2 * width if self.format == "int4" else width
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return quantized.linear(x, self.codes, self.scales)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] that the codes stand for, in fp32, made anew each time."""
        return quantized.dequantize(self.codes, self.scales, torch.float32)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        for name, buffer in list(self._buffers.items()):
            assert buffer is not None
            self._buffers[name] = buffer.to(fn(buffer.new_empty(0)).device)
        return self


def quantizable(config: HybridConfig) -> dict[str, tuple[int, int]]:
    """The matrices that may be quantized by their checkpoint names: [out, in] of the mixers' linears and of
    an own head.
    """
    return {
        name: (declared.shape[0], declared.shape[1])
        for name, declared in param_specs(config).items()
        if name == HEAD or (".mixer." in name and is_linear(name.split(".mixer.")[1], declared.axes))
    }


def quantized_names(config: HybridConfig, format: str, quantize_head: bool = True) -> list[str]:
    """Those of them that `format` has a form for; with or without the head."""
    return [
        name
        for name, (_, inputs) in quantizable(config).items()
        if quantized.holds(format, inputs) and (quantize_head or name != HEAD)
    ]


def check_format(format: str, *others: str) -> None:
    """Raise InputError unless `format` is one of ours, or of `others`."""
    if format not in (*others, *quantized.FORMATS):
        raise InputError(f"the format is {format!r}: known are {', '.join((*others, *quantized.FORMATS))}")


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    format: str,
    importance: Mapping[str, Tensor] | None = None,
    quantize_head: bool = True,
) -> list[str]:
    """Quantize a HybridLM in place, one matrix after another, each weight freed as its codes are made.

    importance: by checkpoint name, mean squares of what enters the columns. Returns the names of the matrices
    that stay: the format has no form for them, or it is the head and `quantize_head` is false. Raises
    InputError for an unknown format, a model that is quantized, weights that are not finite.
    """
    check_format(format)
    config: Any = model.config
    if (found := format_in(model)) is not None:
        raise InputError(f"the model is quantized already ({found}): quantize the one it was made from")
    chosen = quantized_names(config, format, quantize_head)
    for name in chosen:
        weighed = None if importance is None else importance.get(name)
        replace(
            model,
            name.removesuffix(".weight"),
            quantized_linear(name, model.get_parameter(name), format, weighed),
        )
    return [name for name in quantizable(config) if name not in chosen]


def quantized_linear(
    name: str, weight: Tensor | quantized.WeightRows, format: str, importance_K: Tensor | None = None
) -> QuantizedLinear:
    """The matrix `name` [out, in] quantized.

    Raises InputError naming it where a number of it is not finite.
    """
    try:
        return QuantizedLinear(*quantized.quantize(weight, format, importance_K))
    except ValueError as error:
        raise InputError(f"{name} cannot be quantized: {error}") from None


class Difference:
    """How far quantized matrices are from the numbers that they were made of, all together."""

    def __init__(self) -> None:
        self.matrices = 0
        self._difference = self._size = 0.0

    def add(self, linear: QuantizedLinear, weight: Tensor | quantized.WeightRows) -> None:
        """Compare one matrix with its numbers, some rows at a time."""
        self.matrices += 1
        if weight.is_meta:
            return
        rows = max(1, (1 << 20) // linear.in_features)
        for begin in range(0, linear.out_features, rows):
            part = slice(begin, min(begin + rows, linear.out_features))
            exact = weight[part].float()
            found = quantized.dequantize(linear.codes[part], linear.scales[part], torch.float32)
            self._difference += float((found - exact).square().sum())
            self._size += float(exact.square().sum())

    @property
    def share(self) -> float:
        """The norm of the difference relative to the norm of the numbers."""
        return float((self._difference / max(self._size, 1e-30)) ** 0.5)


def replace(model: nn.Module, path: str, linear: nn.Module) -> None:
    """Put `linear` where the module `path` stands."""
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, linear)


def format_in(model: nn.Module) -> str | None:
    """The format that a model's linears are in, the first one found; None where none is quantized."""
    return next((module.format for module in model.modules() if isinstance(module, QuantizedLinear)), None)
