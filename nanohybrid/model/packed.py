"""Models prepared for inference on a CPU: every linear laid out once for the kernels, the original freed as soon as it is.

After `pack_model` a forward with a state is one kernel (model/compiled.py); without one, it is the layers' own on the same panels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nanohybrid.config import ATTENTION
from nanohybrid.model.quantized import QuantizedLinear, quantizable
from nanohybrid.ops.cpu import available
from nanohybrid.ops.cpu.packed import Packed, matmul, pack, unpack


class PackedLinear(nn.Module):
    """Stands where an nn.Linear or a QuantizedLinear stood: for inference, its weight in panels (ops/cpu/tile.py)."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed
        self.format, self.in_features, self.out_features = packed.form, packed.inputs, packed.outputs

    @classmethod
    def of(cls, linear: nn.Module) -> PackedLinear:
        """Of a linear in bfloat16, int8 or int4. Raises ValueError for others."""
        if isinstance(linear, QuantizedLinear):
            return cls(pack(linear.codes, linear.format, linear.scales))
        weight = linear.weight
        assert isinstance(weight, Tensor)
        return cls(pack(weight.detach(), "bf16"))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features] in `dtype` (None: x's)."""
        return matmul(x, self.packed, dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the panels hold, made anew."""
        return unpack(self.packed).to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


def prepare(model: Any) -> bool:
    """Pack a HybridLM for the CPU kernels where they can run it and NANOHYBRID_KERNELS does not ask for others; whether it was."""
    if os.environ.get("NANOHYBRID_KERNELS", "") not in ("", "numba") or not packable(model) or not available():
        return False
    pack_model(model)
    return True


def packable(model: Any) -> bool:
    """Whether the kernels hold all of a HybridLM: on a CPU, activations in bfloat16, linears in bfloat16, int8 or int4."""
    config = model.config
    if ATTENTION in config.pattern and config.head_dim % 16:
        return False
    return model.device.type == "cpu" and model.dtype == torch.bfloat16 and all(_packable(linear) for _, _, linear in _linears(model))


def pack_model(model: Any) -> None:
    """Lay out every linear of a HybridLM, one after another, in place; `packable` says whether that is possible."""
    for owner, leaf, linear in _linears(model):
        if not isinstance(linear, PackedLinear):
            setattr(owner, leaf, PackedLinear.of(linear))
    model.packed = True


def _packable(linear: nn.Module) -> bool:
    if isinstance(linear, QuantizedLinear):
        return linear.format in ("int8", "int4")
    return isinstance(linear, PackedLinear) or getattr(linear, "weight", torch.empty(0)).dtype == torch.bfloat16


def _linears(model: Any) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The module that holds it, its name there, and the linear: of every mixer, and of an own head.

    One after another: a list of them would keep every original alive until the last is laid out.
    """
    for name in quantizable(model.config):
        owner, _, leaf = name.removesuffix(".weight").rpartition(".")
        yield model.get_submodule(owner), leaf, model.get_submodule(name.removesuffix(".weight"))
