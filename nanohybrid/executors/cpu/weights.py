"""Models prepared for the CPU executor: every linear packed into GEMM panels, its original freed as soon as
it is.

A packed model can be run by the CPU kernels (executors/cpu/forward.py), and layer by layer on the same panels
without them.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from nanohybrid.executors.cpu.kernels.packing import Packed, matmul, pack, unpack
from nanohybrid.model.quantized import QuantizedLinear, quantizable
from nanohybrid.ops.numba import available


class PackedLinear(nn.Module):
    """Replaces an nn.Linear or a QuantizedLinear for inference: its weight lies in panels
    (kernels/gemm_tile.py).

    output_dtype: of what it returns; None is that of its input.
    """

    def __init__(self, packed: Packed, output_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.packed, self.output_dtype = packed, output_dtype
        self.format, self.in_features, self.out_features = packed.format, packed.inputs, packed.outputs

    @classmethod
    def of(cls, linear: nn.Module, output_dtype: torch.dtype | None = None) -> PackedLinear:
        """Of a linear in bfloat16, int8 or int4. Raises ValueError for others."""
        if isinstance(linear, QuantizedLinear):
            return cls(pack(linear.codes, linear.format, linear.scales), output_dtype)
        weight = linear.weight
        if not isinstance(weight, Tensor):
            raise ValueError(f"a {type(linear).__name__} has no weight to pack")
        return cls(pack(weight.detach(), "bf16"), output_dtype)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] that the panels hold, in bfloat16, made anew each time."""
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return matmul(x, self.packed, self.output_dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


def prepare(model: Any) -> bool:
    """Pack a HybridLM in place if the CPU kernels can run it and NANOHYBRID_KERNELS allows them.

    Returns whether it is packed.
    """
    asked = os.environ.get("NANOHYBRID_KERNELS", "")
    if asked not in ("", "numba") or not packable(model) or not available():
        return False
    pack_model(model)
    return True


def packable(model: Any) -> bool:
    """Whether the CPU kernels can run a HybridLM as it is: on a CPU, activations in bfloat16, linears in
    bfloat16, int8 or int4, and a kernel for each of its layers.

    Each class of mixer answers for itself which kernel computes it (Mixer.cpu_kernel), and a subclass does
    not inherit the answer.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return False
    if any(block.mixer.cpu_kernel() is None for block in model.backbone.layers):
        return False
    return all(_can_pack(getattr(*place)) for place in _linears(model))


def is_packed(model: Any) -> bool:
    """Whether `pack_model` packed the linears of a HybridLM."""
    first = next(iter(_linears(model)), None)
    return first is not None and isinstance(getattr(*first), PackedLinear)


def pack_model(model: Any) -> None:
    """Pack every linear of a HybridLM, one after another, in place; `packable` says whether that is possible.

    Beside the model there is never more than one of its matrices in memory.
    """
    for owner, leaf in _linears(
        model
    ):  # by place: a list of the linears themselves would hold the weights twice
        if not isinstance(getattr(owner, leaf), PackedLinear):
            head = owner is model
            setattr(owner, leaf, PackedLinear.of(getattr(owner, leaf), torch.float32 if head else None))


def _can_pack(linear: nn.Module) -> bool:
    if isinstance(linear, QuantizedLinear):
        return linear.format in ("int8", "int4")
    return (
        isinstance(linear, PackedLinear) or getattr(linear, "weight", torch.empty(0)).dtype == torch.bfloat16
    )


def _linears(model: Any) -> list[tuple[nn.Module, str]]:
    """Where each linear is, as the module that holds it and its name there: of every mixer, and of an untied head."""
    paths = [name.removesuffix(".weight").rpartition(".") for name in quantizable(model.config)]
    return [(model.get_submodule(owner), leaf) for owner, _, leaf in paths]
