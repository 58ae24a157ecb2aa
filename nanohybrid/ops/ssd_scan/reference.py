"""The SSD recurrence of Mamba-2, one token at a time: the reference that every faster form is tested against.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t        (Dao & Gu 2024, section 2)

T tokens, S sequences, H heads, P head dimension, G groups, N state size. Head h reads group h // (H // G).
"""

import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan.inputs import SSDInputs


def ssd_scan(
    inputs: SSDInputs, layout: Layout, output_final_state: bool = True
) -> tuple[Tensor, Tensor | None]:
    """y_THP and the final states (None unless `output_final_state`), computed in the dtype of dt."""
    x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN = inputs
    heads_per_group = x_THP.shape[1] // B_TGN.shape[1]
    x_THP = x_THP.to(dt_TH.dtype)
    B_THN = B_TGN.to(dt_TH.dtype).repeat_interleave(heads_per_group, dim=1)
    C_THN = C_TGN.to(dt_TH.dtype).repeat_interleave(heads_per_group, dim=1)
    ys, finals = [], []
    for sequence in range(layout.sequences):
        if initial_SHPN is None:
            state_HPN = x_THP.new_zeros(*x_THP.shape[1:], B_TGN.shape[-1])
        else:
            state_HPN = initial_SHPN[sequence].to(dt_TH.dtype)
        for t in range(layout.starts[sequence], layout.starts[sequence + 1]):
            decayed_HPN = torch.einsum("H,HPN->HPN", torch.exp(dt_TH[t] * A_H), state_HPN)
            state_HPN = decayed_HPN + torch.einsum("H,HP,HN->HPN", dt_TH[t], x_THP[t], B_THN[t])
            read_HP = torch.einsum("HPN,HN->HP", state_HPN, C_THN[t])
            ys.append(read_HP + torch.einsum("H,HP->HP", D_H, x_THP[t]))
        finals.append(state_HPN)
    return torch.stack(ys), torch.stack(finals) if output_final_state else None
