"""The gradients of the gated group norm, and of plain RMSNorm (no gate, one group), as one Triton kernel.

    u = y silu(z)        r = 1 / sqrt(mean(u^2) + eps)        a = do weight
    du = r (a - u r^2 mean(a u))        dweight = sum_t do u r
    dy = du silu(z)        dz = du y silu'(z)        silu'(z) = s (1 + z (1 - s)),  s = sigmoid(z)

Where y also continues as the residual stream, the gradient of that path is added to dy.

A tile is some tokens of one group. The kernel reads the group in blocks of 256 channels, first for the two
means, then for the gradients. A group of 1,280 is five blocks without padding, and the second pass finds the
tile in the cache.

T tokens · D channels · G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.launch import cdiv, contiguous_rows, next_power_of_2

# Of a block. dweight_tiles, one row per tile, is then a twentieth of what is read and written.
TOKENS, CHANNELS = 8, 256


@triton.jit
def norm_gradients(
    do, y, z, weight, residual_grad, dy, dz, dweight_tiles, stride_do, stride_y, stride_z, T, D, eps, WIDTH:
    tl.constexpr, GATED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, TOKENS: tl.constexpr, CHANNELS:
    tl.constexpr,
):  # fmt: skip
    """dy and dz [T, D]; dweight_tiles [tiles, D]: each tile's part of dweight."""
    tile, begin = tl.program_id(0), tl.program_id(1) * WIDTH
    t = tile * TOKENS + tl.arange(0, TOKENS)
    rows = t.to(tl.int64)[:, None]
    squares, products = tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS,), tl.float32)
    for first in range(0, WIDTH, CHANNELS):
        d = first + tl.arange(0, CHANNELS)
        inside = (t < T)[:, None] & (d < WIDTH)[None, :]
        u = tl.load(y + rows * stride_y + (begin + d)[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATED:
            z_TD = tl.load(z + rows * stride_z + (begin + d)[None, :], mask=inside, other=0.0).to(tl.float32)
            u *= z_TD * tl.sigmoid(z_TD)
        a = tl.load(do + rows * stride_do + (begin + d)[None, :], mask=inside, other=0.0).to(tl.float32)
        a *= tl.load(weight + begin + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
        squares += tl.sum(u * u, 1)
        products += tl.sum(a * u, 1)
    r = 1.0 / tl.sqrt_rn(squares / WIDTH + eps)
    pull = r * r * products / WIDTH
    for second_first in range(0, WIDTH, CHANNELS):
        e = second_first + tl.arange(0, CHANNELS)
        inside_e = (t < T)[:, None] & (e < WIDTH)[None, :]
        y_TD = tl.load(y + rows * stride_y + (begin + e)[None, :], mask=inside_e, other=0.0).to(tl.float32)
        do_TD = tl.load(do + rows * stride_do + (begin + e)[None, :], mask=inside_e, other=0.0).to(tl.float32)
        weight_D = tl.load(weight + begin + e, mask=e < WIDTH, other=0.0).to(tl.float32)[None, :]
        gated = y_TD
        if GATED:
            gate = tl.load(z + rows * stride_z + (begin + e)[None, :], mask=inside_e, other=0.0).to(
                tl.float32
            )
            sigmoid = tl.sigmoid(gate)
            gated = y_TD * gate * sigmoid
        du = r[:, None] * (do_TD * weight_D - gated * pull[:, None])
        tl.store(
            dweight_tiles + tile.to(tl.int64) * D + begin + e,
            tl.sum(do_TD * gated * r[:, None], 0),
            mask=e < WIDTH,
        )
        at = rows * D + (begin + e)[None, :]
        if GATED:
            tl.store(
                dz + at,
                (du * y_TD * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dz.dtype.element_ty),
                mask=inside_e,
            )
            du *= gate * sigmoid
        if HAS_RESIDUAL:
            du += tl.load(residual_grad + at, mask=inside_e, other=0.0).to(tl.float32)
        tl.store(dy + at, du.to(dy.dtype.element_ty), mask=inside_e)


def gated_norm_backward(
    do_TD: Tensor, y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dz and dweight, each in the dtype of its input."""
    dz_TD = torch.empty(z_TD.shape, dtype=z_TD.dtype, device=z_TD.device)
    dy_TD, dweight_D = _launch(do_TD, y_TD, contiguous_rows(z_TD), dz_TD, weight_D, None, groups, eps)
    return dy_TD, dz_TD, dweight_D


def rms_norm_backward(
    do_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, residual_grad_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx and dweight, each in the dtype of its input. residual_grad_TD: x's gradient from another path, added
    to dx.
    """
    return _launch(do_TD, x_TD, None, None, weight_D, residual_grad_TD, 1, eps)


def _launch(
    do: Tensor,
    y: Tensor,
    z: Tensor | None,
    dz: Tensor | None,
    weight: Tensor,
    residual_grad: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    do, y, residual_grad = (
        contiguous_rows(do),
        contiguous_rows(y),
        None if residual_grad is None else residual_grad.contiguous(),
    )
    T, D = y.shape
    tiles = cdiv(T, TOKENS)
    dy = torch.empty((T, D), dtype=y.dtype, device=y.device)
    dweight_tiles = torch.empty((tiles, D), dtype=torch.float32, device=y.device)
    norm_gradients[tiles, groups](
        do, y, z, weight, residual_grad, dy, dz, dweight_tiles, do.stride(0), y.stride(0), 0 if z is None else
        z.stride(0), T, D, eps, WIDTH=D // groups, GATED=z is not None, HAS_RESIDUAL=residual_grad is not
        None, TOKENS=TOKENS, CHANNELS=min(CHANNELS, next_power_of_2(D // groups)),
    )  # fmt: skip
    return dy, dweight_tiles.sum(0).to(weight.dtype)
