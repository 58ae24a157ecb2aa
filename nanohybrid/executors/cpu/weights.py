"""Models prepared for inference on a CPU: every linear laid out once for the kernels, the original freed as soon as it is.

After `pack_model` a forward with a state is one kernel (executors/cpu/forward.py); without one, it is the layers' own on the same panels.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from nanohybrid.config import ATTENTION
from nanohybrid.executors.cpu.kernels.packing import Packed, matmul, pack, unpack
from nanohybrid.model.quantized import QuantizedLinear, quantizable
from nanohybrid.ops.numba import available


class PackedLinear(nn.Module):
    """Stands where an nn.Linear or a QuantizedLinear stood: for inference, its weight in panels (executors/cpu/kernels/gemm_tile.py)."""

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
    if (
        os.environ.get("NANOHYBRID_KERNELS", "") not in ("", "numba")
        or not packable(model)
        or not available()
    ):
        return False
    pack_model(model)
    return True


def packable(model: Any) -> bool:
    """Whether the kernels hold all of a HybridLM: on a CPU, activations in bfloat16, linears in bfloat16, int8 or int4."""
    config = model.config
    if ATTENTION in config.pattern and config.head_dim % 16:
        return False
    return (
        model.device.type == "cpu"
        and model.dtype == torch.bfloat16
        and all(_packable(getattr(*place)) for place in _linears(model))
    )


def pack_model(model: Any) -> None:
    """Lay out every linear of a HybridLM, one after another, in place; `packable` says whether that is possible. Beside the model
    there is never more than one of its matrices."""
    for owner, leaf in _linears(
        model
    ):  # places and not the linears, which a list of them would keep: twice the weights at the end
        if not isinstance(getattr(owner, leaf), PackedLinear):
            setattr(owner, leaf, PackedLinear.of(getattr(owner, leaf)))
    model.packed = True


def _packable(linear: nn.Module) -> bool:
    if isinstance(linear, QuantizedLinear):
        return linear.format in ("int8", "int4")
    return (
        isinstance(linear, PackedLinear) or getattr(linear, "weight", torch.empty(0)).dtype == torch.bfloat16
    )


def _linears(model: Any) -> list[tuple[nn.Module, str]]:
    """Where a linear is, as the module that holds it and its name there: of every mixer, and of an own head."""
    paths = [name.removesuffix(".weight").rpartition(".") for name in quantizable(model.config)]
    return [(model.get_submodule(owner), leaf) for owner, _, leaf in paths]
