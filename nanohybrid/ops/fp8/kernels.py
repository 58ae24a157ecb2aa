"""The Triton form of the FP8 linear: each operand is quantized once, for all three products.

The forward pass saves x^T and W^T in FP8 for the backward pass, not x in bf16. Both are quantized from the
unquantized x and W (reference.py).

T tokens, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanohybrid.ops.fp8.products import product
from nanohybrid.ops.fp8.quantize_kernels import Operand, quantize_blocks, quantize_tiles
from nanohybrid.ops.fp8.torch import with_bias


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """As torch.linear: x [..., I] W^T (+ bias). The result and gradients are in their operands' dtypes."""
    return with_bias(_Linear.apply, x, weight_OI, bias_O)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        x_rows, x_columns = quantize_tiles(x.reshape(-1, x.shape[-1]), columns=ctx.needs_input_grad[1])
        weight, transposed = quantize_blocks(weight_OI)
        assert x_rows is not None
        ctx.save_for_backward(*(x_columns or (None, None)), *transposed)
        ctx.dtypes, ctx.shape = (x.dtype, weight_OI.dtype), x.shape
        return product(x_rows, weight, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_q, x_scales, weight_q, weight_scales = ctx.saved_tensors
        rows, columns = quantize_tiles(dy.reshape(-1, dy.shape[-1]), *ctx.needs_input_grad)
        dx = dweight_OI = None
        if rows is not None:
            dx = product(rows, Operand(weight_q, weight_scales), ctx.dtypes[0]).view(ctx.shape)
        if columns is not None:
            dweight_OI = product(columns, Operand(x_q, x_scales), ctx.dtypes[1])
        return dx, dweight_OI
