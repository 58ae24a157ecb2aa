"""The gated norm on a GPU in one pass, with one program per token and group.

Everything before the cast is fp32.

T tokens · D channels · d channels of a group.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.launch import next_power_of_2


def gated_norm(y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """In the dtype of z."""
    T, D = y_TD.shape
    y_TD, z_TD = (x if x.stride(1) == 1 else x.contiguous() for x in (y_TD, z_TD))
    out_TD = z_TD.new_empty(T, D)
    d = D // groups
    _gated_norm[(T, groups)](
        y_TD, z_TD, weight_D, out_TD, d, D, y_TD.stride(0), z_TD.stride(0), eps, WIDTH=next_power_of_2(d)
    )
    return out_TD


@triton.jit
def _gated_norm(y, z, weight, out, d, D, y_stride, z_stride, eps, WIDTH: tl.constexpr):
    t, c = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, at = c < d, tl.program_id(1) * d + c
    gate = tl.load(z + t * z_stride + at, mask=inside, other=0).to(tl.float32)
    u = tl.load(y + t * y_stride + at, mask=inside, other=0).to(tl.float32) * gate / (1 + tl.exp(-gate))
    u = u / tl.sqrt(tl.sum(u * u, 0) / d + eps) * tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + t * D + at, u.to(out.dtype.element_ty), mask=inside)
