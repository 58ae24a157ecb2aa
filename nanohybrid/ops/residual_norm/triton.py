"""The residual sum and its RMSNorm on a GPU, one program per token. The stream is read once and written once.

T tokens · E hidden size.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.launch import next_power_of_2


def residual_norm(h_TE: Tensor, update_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm, both in h's dtype."""
    T, E = h_TE.shape
    h_TE, update_TE = h_TE.contiguous(), update_TE.contiguous()
    s_TE, normed_TE = h_TE.new_empty(T, E), h_TE.new_empty(T, E)
    _residual_norm[(T,)](
        h_TE,
        update_TE,
        weight_E,
        s_TE,
        normed_TE,
        E,
        eps,
        WIDTH=next_power_of_2(E),
        num_warps=8 if E > 2048 else 4,
    )
    return s_TE, normed_TE


@triton.jit
def _residual_norm(h, update, weight, s, normed, E, eps, WIDTH: tl.constexpr):
    t, c = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, at = c < E, t * E + c
    total = tl.load(h + at, mask=inside, other=0).to(tl.float32) + tl.load(
        update + at, mask=inside, other=0
    ).to(tl.float32)
    total = total.to(s.dtype.element_ty)
    tl.store(s + at, total, mask=inside)
    wide = total.to(tl.float32)
    wide = (
        wide
        / tl.sqrt(tl.sum(wide * wide, 0) / E + eps)
        * tl.load(weight + c, mask=inside, other=0).to(tl.float32)
    )
    tl.store(normed + at, wide.to(normed.dtype.element_ty), mask=inside)
