"""The SSD step for a few tokens of each of S sequences, one after the other: the sums of as many steps, bit for bit.

For windows of drafted tokens: the chunked scan would be faster, but round differently from the steps it stands for.

S sequences · L tokens of each · H heads · P head dimension · G groups · N state size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanohybrid.ops.ssd_step import ssd_step


def ssd_steps(
    x_SLHP: Tensor,
    dt_SLH: Tensor,
    A_H: Tensor,
    B_SLGN: Tensor,
    C_SLGN: Tensor,
    D_H: Tensor,
    state_SHPN: Tensor,
    rounded: Callable[[Tensor, int], Tensor] = lambda state, _: state,
) -> tuple[Tensor, Tensor]:
    """y_SLHP and the last state; the given one may be overwritten. A token with x = 0 and dt = 0 leaves the state as it is.

    `rounded` is what storing the state after token l would make of it, where that is not what it was.
    """
    ys = []
    for token in range(x_SLHP.shape[1]):
        y_SHP, state_SHPN = ssd_step(
            x_SLHP[:, token], dt_SLH[:, token], A_H, B_SLGN[:, token], C_SLGN[:, token], D_H, state_SHPN
        )
        state_SHPN = rounded(state_SHPN, token)
        ys.append(y_SHP)
    return torch.stack(ys, dim=1), state_SHPN
