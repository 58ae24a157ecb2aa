"""The Triton form of the residual norm, an autograd function over triton.py and gated_norm/backward.py."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanohybrid.ops.dispatch import wants_gradient
from nanohybrid.ops.gated_norm.backward import rms_norm_backward
from nanohybrid.ops.residual_norm import triton


def residual_norm(h_TE: Tensor, update_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm, both in h's dtype."""
    if not wants_gradient(h_TE, update_TE, weight_E):
        return triton.residual_norm(h_TE, update_TE, weight_E, eps)
    s_TE, normed_TE = _ResidualNorm.apply(h_TE, update_TE, weight_E, eps)
    return s_TE, normed_TE


class _ResidualNorm(Function):
    """Saves only the sum, which is in memory as the stream.

    The stream's own gradient is added in the norm's backward kernel.
    """

    @staticmethod
    def forward(
        ctx: Any, h_TE: Tensor, update_TE: Tensor, weight_E: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        s_TE, normed_TE = triton.residual_norm(h_TE, update_TE, weight_E, eps)
        ctx.save_for_backward(s_TE, weight_E)
        ctx.eps, ctx.dtype = eps, update_TE.dtype
        return s_TE, normed_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds_TE: Tensor, dnormed_TE: Tensor) -> tuple[Tensor | None, ...]:
        s_TE, weight_E = ctx.saved_tensors
        dh_TE, dweight_E = rms_norm_backward(dnormed_TE, s_TE, weight_E, ctx.eps, ds_TE)
        return dh_TE, dh_TE.to(ctx.dtype), dweight_E, None
