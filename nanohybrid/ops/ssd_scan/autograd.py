"""The scan as autograd wants it, for forms that write their own gradient: the inputs are kept, states are made again."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanohybrid.ops.layout import Layout


class Scan(Function):
    """`forward` has the scan's own arguments; `backward` gets dy, the final states' gradient (None if nobody used them) and then the
    same without `keep`, and returns the gradients of all but the layout."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN, layout: Layout, keep: bool,
        forward: Callable[..., tuple[Tensor, Tensor | None]], backward: Callable[..., tuple[Tensor | None, ...]],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ctx.save_for_backward(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN)
        ctx.layout, ctx.backward_of = layout, backward
        ctx.set_materialize_grads(False)  # a state that nobody used has no gradient
        return forward(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, layout, initial_SHPN, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THP: Tensor | None, dfinal_SHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, initial_SHPN = ctx.saved_tensors
        dy_THP = inputs[1].new_zeros(inputs[0].shape) if dy_THP is None else dy_THP  # in the steps' dtype
        return (
            *ctx.backward_of(dy_THP, dfinal_SHPN, *inputs, ctx.layout, initial_SHPN),
            None,
            None,
            None,
            None,
        )
