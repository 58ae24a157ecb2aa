"""One token of the SSD recurrence for each of S sequences: the decode step of Mamba-2."""

from torch import Tensor

from nanohybrid.ops.dispatch import choose
from nanohybrid.ops.ssd_step import reference
from nanohybrid.ops.ssd_step import torch as torch_form


def ssd_step(
    x_SHP: Tensor, dt_SH: Tensor, A_H: Tensor, B_SGN: Tensor, C_SGN: Tensor, D_H: Tensor, state_SHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """y_SHP and the next state.

    The given state may be updated in place, so only the returned one may be used.

    dtypes as in ssd_scan.
    """
    step = choose(
        x_SHP,
        dt_SH,
        A_H,
        B_SGN,
        C_SGN,
        D_H,
        state_SHPN,
        reference=reference.ssd_step,
        torch=torch_form.ssd_step,
    )
    return step(x_SHP, dt_SH, A_H, B_SGN, C_SGN, D_H, state_SHPN)
