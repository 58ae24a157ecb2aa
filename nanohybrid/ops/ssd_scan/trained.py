"""The scan's kernels with their gradient, as autograd wants them."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanohybrid.ops.dispatch import wants_gradient
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import triton
from nanohybrid.ops.ssd_scan.backward import ssd_scan_backward


def ssd_scan(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    D_H: Tensor,
    layout: Layout,
    initial_SHPN: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y_THP in fp32, and the final states (None unless `keep`)."""
    if not wants_gradient(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN):
        return triton.ssd_scan(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, layout, initial_SHPN, keep)
    y_THP, final_SHPN = _Scan.apply(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN, layout, keep)
    return y_THP, final_SHPN


class _Scan(Function):
    """Keeps its inputs alone; the states at the borders of chunks are made again."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN, layout: Layout, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN)
        ctx.layout = layout
        ctx.set_materialize_grads(False)  # a state that nobody used has no gradient
        return triton.ssd_scan(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, layout, initial_SHPN, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THP: Tensor | None, dfinal_SHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN = ctx.saved_tensors
        if dy_THP is None:
            dy_THP = dt_TH.new_zeros(x_THP.shape)
        inputs = x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H
        return *ssd_scan_backward(dy_THP, dfinal_SHPN, *inputs, ctx.layout, initial_SHPN), None, None
