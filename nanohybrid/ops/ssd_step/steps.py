"""The SSD step for a few tokens of each of S sequences in order, with the bits of single steps.

For draft tokens: the chunked scan would be faster, but its rounding differs from that of decode steps.

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
    round_state: Callable[[Tensor, int], Tensor] = lambda state, _: state,
) -> tuple[Tensor, Tensor]:
    """y_SLHP and the last state; the given state may be overwritten.

    A token with x = 0 and dt = 0 does not change the state.

    round_state(state, l): the state after token l as it would be after storing it in the cache's dtype.
    """
    ys = []
    for token in range(x_SLHP.shape[1]):
        y_SHP, state_SHPN = ssd_step(
            x_SLHP[:, token], dt_SLH[:, token], A_H, B_SLGN[:, token], C_SLGN[:, token], D_H, state_SHPN
        )
        state_SHPN = round_state(state_SHPN, token)
        ys.append(y_SHP)
    return torch.stack(ys, dim=1), state_SHPN
