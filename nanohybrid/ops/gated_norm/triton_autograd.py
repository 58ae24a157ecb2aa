"""The Triton form of the gated norm, an autograd function over triton.py and backward.py."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanohybrid.ops.dispatch import wants_gradient
from nanohybrid.ops.gated_norm import triton
from nanohybrid.ops.gated_norm.backward import gated_norm_backward


def gated_norm(y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """In the dtype of z."""
    if not wants_gradient(y_TD, z_TD, weight_D):
        return triton.gated_norm(y_TD, z_TD, weight_D, groups, eps)
    normed_TD: Tensor = _GatedNorm.apply(y_TD, z_TD, weight_D, groups, eps)
    return normed_TD


class _GatedNorm(Function):
    """Saves only its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(y_TD, z_TD, weight_D)
        ctx.groups, ctx.eps = groups, eps
        return triton.gated_norm(y_TD, z_TD, weight_D, groups, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_TD, z_TD, weight_D = ctx.saved_tensors
        return *gated_norm_backward(do_TD, y_TD, z_TD, weight_D, ctx.groups, ctx.eps), None, None
