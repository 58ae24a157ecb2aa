"""s = h + update;  out = weight s / sqrt(mean(s^2) + eps)."""

import torch
from torch import Tensor


def residual_norm(h_TE: Tensor, update_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum is rounded to h's dtype before the norm: it is the stream to which the next layer adds."""
    s_TE = h_TE + update_TE
    wide = s_TE.to(torch.promote_types(s_TE.dtype, torch.float32))
    normed_TE = wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + eps)
    return s_TE, (normed_TE * weight_E.to(wide.dtype)).to(h_TE.dtype)
