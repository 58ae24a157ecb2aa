"""The numba form of the gated norm, over ops/numba/norms.py. rms_norm uses it without a gate."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanohybrid.ops.gated_norm import torch as torch_form
from nanohybrid.ops.numba import norms
from nanohybrid.ops.numba.threads import num_threads, run

SUPPORTED = (torch.float32, torch.bfloat16)


def gated_norm(y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """In the dtype of z."""
    if y_TD.ndim != 2 or not {y_TD.dtype, z_TD.dtype} <= set(SUPPORTED):
        return torch_form.gated_norm(y_TD, z_TD, weight_D, groups, eps)
    return normed(y_TD, z_TD, weight_D, groups, eps, z_TD.dtype)


def normed(
    x_TD: Tensor, z_TD: Tensor | None, weight_D: Tensor, groups: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """RMSNorm within groups of x, or of x silu(z) where z is given, in `dtype`, which must be that of z."""
    out_TD: Tensor = _Norm.apply(x_TD, z_TD, weight_D, groups, eps, dtype)
    return out_TD


class _Norm(Function):
    """Saves only its inputs for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, z_TD: Tensor | None, weight_D: Tensor, groups: int, eps: float, dtype:
        torch.dtype
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x_TD, z_TD, weight_D)
        ctx.groups, ctx.eps, ctx.dtype = groups, eps, dtype
        out_TD = torch.empty(x_TD.shape, dtype=dtype)
        args, _alive = _arguments(x_TD, z_TD, weight_D, groups, eps)
        run(
            norms.norm_forward,
            *args,
            out_TD.data_ptr(),
            dtype == torch.bfloat16,
            size=num_threads(x_TD.nbytes + 2 * out_TD.nbytes),
        )
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, z_TD, weight_D = ctx.saved_tensors
        dout_TD = dout_TD.contiguous()
        dx_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
        dz_TD = None if z_TD is None else torch.empty(z_TD.shape, dtype=z_TD.dtype)
        dweight_RD = torch.empty(-(-len(x_TD) // norms.TILE_ROWS), x_TD.shape[1])
        args, _alive = _arguments(x_TD, z_TD, weight_D, ctx.groups, ctx.eps)
        where = (
            dout_TD.data_ptr(),
            dx_TD.data_ptr(),
            0 if dz_TD is None else dz_TD.data_ptr(),
            ctx.dtype == torch.bfloat16,
        )
        run(
            norms.norm_backward,
            *args,
            *where,
            dweight_RD.data_ptr(),
            size=num_threads(2 * x_TD.nbytes + 3 * dout_TD.nbytes),
        )
        return dx_TD, dz_TD, dweight_RD.sum(0).to(weight_D.dtype), None, None, None


def _arguments(
    x_TD: Tensor, z_TD: Tensor | None, weight_D: Tensor, groups: int, eps: float
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The first arguments of both kernels, and the tensors whose addresses they hold."""
    x, weight = _rows(x_TD), weight_D.detach().float().contiguous()
    z = None if z_TD is None else _rows(z_TD)
    gate = (0, 0) if z is None else (z.data_ptr(), z.stride(0))
    args = (
        *x.shape,
        groups,
        x.data_ptr(),
        x.stride(0),
        x.dtype == torch.bfloat16,
        *gate,
        weight.data_ptr(),
        eps,
    )
    return args, [x, weight] if z is None else [x, weight, z]


def _rows(x_TD: Tensor) -> Tensor:
    return x_TD.detach() if x_TD.stride(1) == 1 else x_TD.detach().contiguous()
