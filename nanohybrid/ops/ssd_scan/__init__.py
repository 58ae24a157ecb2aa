"""The SSD scan of Mamba-2 over a ragged batch, with states that carry across calls."""

from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import reference
from nanohybrid.ops.ssd_scan import torch as torch_form

NUMBA = Kernel("nanohybrid.ops.ssd_scan.numba:ssd_scan", gradients=True)
TRITON = Kernel("nanohybrid.ops.ssd_scan.triton_autograd:ssd_scan", gradients=True)


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
    """Scan every sequence of `layout`; see reference.py for the equation.

    x, B, C: any float dtype. dt (after softplus), A (negative), D, initial: fp32, or float64 throughout.
    initial_SHPN: the state each sequence starts from; None is zeros. Sums run in fp32 (float64 for float64).
    Returns y_THP in fp32 (float64) and, where `keep`, the final states [S, H, P, N]; training keeps none.
    """
    given = x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN
    scan = choose(*given, reference=reference.ssd_scan, torch=torch_form.ssd_scan, numba=NUMBA, triton=TRITON)
    return scan(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, layout, initial_SHPN, keep)
