"""RMSNorm on a GPU in one pass each way.

Only x is saved. A tile is some whole rows, more of them where rows are short.

T rows · D width.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanohybrid.ops.gated_norm.backward import rms_norm_backward
from nanohybrid.ops.launch import cdiv, contiguous_rows, next_power_of_2

ELEMENTS = 4096  # of a tile


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In x's dtype; sums are fp32."""
    normed: Tensor = _RMSNorm.apply(contiguous_rows(x.flatten(0, -2)), weight, eps)
    return normed.view(x.shape)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_TD, weight_D)
        ctx.eps = eps
        (T, D), width = x_TD.shape, next_power_of_2(x_TD.shape[1])
        rows = max(1, ELEMENTS // width)
        normed_TD = x_TD.new_empty(T, D)
        _rms_norm[(cdiv(T, rows),)](
            x_TD,
            weight_D,
            normed_TD,
            x_TD.stride(0),
            T,
            D,
            eps,
            ROWS=rows,
            WIDTH=width,
            num_warps=8 if width > 2048 else 4,
        )
        return normed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D = ctx.saved_tensors
        return *rms_norm_backward(do_TD, x_TD, weight_D, ctx.eps), None


@triton.jit
def _rms_norm(x, weight, normed, stride, T, D, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    row = t.to(tl.int64)[:, None]
    inside = (t < T)[:, None] & (d < D)[None, :]
    x_TD = tl.load(x + row * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    scaled = x_TD / tl.sqrt_rn(tl.sum(x_TD * x_TD, 1) / D + eps)[:, None]
    scaled *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + row * D + d[None, :], scaled.to(normed.dtype.element_ty), mask=inside)
