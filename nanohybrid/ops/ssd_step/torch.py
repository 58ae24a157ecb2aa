"""The SSD step as in-place decay, rank-one update and a batched product: two passes over the state."""

import torch
from torch import Tensor


def ssd_step(
    x_SHP: Tensor, dt_SH: Tensor, A_H: Tensor, B_SGN: Tensor, C_SGN: Tensor, D_H: Tensor, state_SHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """y_SHP and the state, which is updated in place unless it needs a gradient."""
    (S, H, P), (G, N) = x_SHP.shape, B_SGN.shape[1:]
    with torch.autocast(x_SHP.device.type, enabled=False):
        x_SHP, B_SGN, C_SGN = x_SHP.to(dt_SH.dtype), B_SGN.to(dt_SH.dtype), C_SGN.to(dt_SH.dtype)
        decay = (dt_SH * A_H).exp()[..., None, None]
        dtxB_SGMN = (x_SHP * dt_SH[..., None]).view(S, G, -1, 1) * B_SGN[:, :, None]
        if torch.is_grad_enabled() and state_SHPN.requires_grad:
            state_SHPN = state_SHPN * decay + dtxB_SGMN.view(S, H, P, N)
        else:
            state_SHPN.mul_(decay).add_(dtxB_SGMN.view(S, H, P, N))
        read_SHP = (state_SHPN.view(S, G, -1, N) @ C_SGN[..., None]).view(S, H, P)
        return torch.addcmul(read_SHP, D_H[:, None], x_SHP), state_SHPN
