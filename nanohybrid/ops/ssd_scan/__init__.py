"""The SSD scan of Mamba-2 over a ragged batch, with states that carry over between calls."""

from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import reference
from nanohybrid.ops.ssd_scan import torch as torch_form
from nanohybrid.ops.ssd_scan.inputs import SSDInputs

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
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Scan every sequence of `layout`; reference.py has the equation.

    x, B, C: any float dtype. dt (after softplus), A (negative), D, initial: fp32, or float64 throughout.
    initial: the state that each sequence starts from; None is zeros. Sums are fp32 (float64 for float64).

    Returns y_THP in fp32 (float64), and the final states [S, H, P, N] where `output_final_state`, else None.
    """
    inputs = SSDInputs(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN)
    scan = choose(
        *inputs, reference=reference.ssd_scan, torch=torch_form.ssd_scan, numba=NUMBA, triton=TRITON
    )
    return scan(inputs, layout, output_final_state)
