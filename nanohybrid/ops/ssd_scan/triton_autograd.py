"""The scan's kernels with their gradient, as autograd wants them."""

from torch import Tensor

from nanohybrid.ops.dispatch import wants_gradient
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import triton
from nanohybrid.ops.ssd_scan.autograd import Scan
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
    y_THP, final_SHPN = Scan.apply(
        x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN, layout, keep, triton.ssd_scan, ssd_scan_backward
    )
    return y_THP, final_SHPN
