"""S' = exp(dt A) S + dt x B^T,  y = S' C + D x: ssd_scan's recurrence for one token of each sequence."""

import torch
from torch import Tensor


def ssd_step(
    x_SHP: Tensor, dt_SH: Tensor, A_H: Tensor, B_SGN: Tensor, C_SGN: Tensor, D_H: Tensor, state_SHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """y_SHP and the next state; the given state is not changed."""
    heads_per_group = x_SHP.shape[1] // B_SGN.shape[1]
    x_SHP = x_SHP.to(dt_SH.dtype)
    B_SHN = B_SGN.to(dt_SH.dtype).repeat_interleave(heads_per_group, dim=1)
    C_SHN = C_SGN.to(dt_SH.dtype).repeat_interleave(heads_per_group, dim=1)
    decayed = torch.einsum("SH,SHPN->SHPN", torch.exp(dt_SH * A_H), state_SHPN)
    state_SHPN = decayed + torch.einsum("SH,SHP,SHN->SHPN", dt_SH, x_SHP, B_SHN)
    return torch.einsum("SHPN,SHN->SHP", state_SHPN, C_SHN) + torch.einsum(
        "H,SHP->SHP", D_H, x_SHP
    ), state_SHPN
