"""The gradients of the gated group norm, and of the plain RMSNorm that it is without a gate, as one Triton kernel.

    u = y silu(z)        r = 1 / sqrt(mean(u^2) + eps)        a = do weight
    du = r (a - u r^2 mean(a u))        dweight = sum_t do u r
    dy = du silu(z)        dz = du y silu'(z)        silu'(z) = s (1 + z (1 - s)),  s = sigmoid(z)

Where y is also passed on, as the residual stream is, the gradient that comes back from there is added to dy.

A tile is some tokens of one group. The group is walked in blocks of 256 channels, first for the two means, then for the
gradients: a group of 1,280 is five blocks without padding, and the second reading finds the tile in the cache.

T tokens · D channels · G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.launch import blocks, power, rows_in_place

TOKENS, CHANNELS = (
    8,
    256,
)  # of a block; dweight's sums, one row a tile, are then a twentieth of what is read and written


@triton.jit
def norm_gradients(
    do, y, z, weight, passed, dy, dz, sums, stride_do, stride_y, stride_z, T, D, eps,
    WIDTH: tl.constexpr, GATED: tl.constexpr, PASSED: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dy and dz [T, D]; sums [tiles, D]: of each tile, its share of dweight."""
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
    for first_again in range(0, WIDTH, CHANNELS):
        e = first_again + tl.arange(0, CHANNELS)
        there = (t < T)[:, None] & (e < WIDTH)[None, :]
        y_TD = tl.load(y + rows * stride_y + (begin + e)[None, :], mask=there, other=0.0).to(tl.float32)
        do_TD = tl.load(do + rows * stride_do + (begin + e)[None, :], mask=there, other=0.0).to(tl.float32)
        weight_D = tl.load(weight + begin + e, mask=e < WIDTH, other=0.0).to(tl.float32)[None, :]
        gated = y_TD
        if GATED:
            gate = tl.load(z + rows * stride_z + (begin + e)[None, :], mask=there, other=0.0).to(tl.float32)
            opened = tl.sigmoid(gate)
            gated = y_TD * gate * opened
        du = r[:, None] * (do_TD * weight_D - gated * pull[:, None])
        tl.store(
            sums + tile.to(tl.int64) * D + begin + e, tl.sum(do_TD * gated * r[:, None], 0), mask=e < WIDTH
        )
        at = rows * D + (begin + e)[None, :]
        if GATED:
            tl.store(
                dz + at,
                (du * y_TD * opened * (1.0 + gate * (1.0 - opened))).to(dz.dtype.element_ty),
                mask=there,
            )
            du *= gate * opened
        if PASSED:
            du += tl.load(passed + at, mask=there, other=0.0).to(tl.float32)
        tl.store(dy + at, du.to(dy.dtype.element_ty), mask=there)


def gated_norm_backward(
    do_TD: Tensor, y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dz and dweight, each in the dtype of what it belongs to."""
    dz_TD = torch.empty(z_TD.shape, dtype=z_TD.dtype, device=z_TD.device)
    dy_TD, dweight_D = _launch(do_TD, y_TD, rows_in_place(z_TD), dz_TD, weight_D, None, groups, eps)
    return dy_TD, dz_TD, dweight_D


def rms_norm_backward(
    do_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, passed_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx and dweight, each in the dtype of what it belongs to. passed_TD: x's gradient from elsewhere, added to dx."""
    return _launch(do_TD, x_TD, None, None, weight_D, passed_TD, 1, eps)


def _launch(
    do: Tensor,
    y: Tensor,
    z: Tensor | None,
    dz: Tensor | None,
    weight: Tensor,
    passed: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    do, y, passed = rows_in_place(do), rows_in_place(y), None if passed is None else passed.contiguous()
    T, D = y.shape
    tiles = blocks(T, TOKENS)
    dy = torch.empty((T, D), dtype=y.dtype, device=y.device)
    sums = torch.empty((tiles, D), dtype=torch.float32, device=y.device)
    norm_gradients[tiles, groups](
        do, y, z, weight, passed, dy, dz, sums, do.stride(0), y.stride(0), 0 if z is None else z.stride(0), T, D, eps,
        WIDTH=D // groups, GATED=z is not None, PASSED=passed is not None, TOKENS=TOKENS, CHANNELS=min(CHANNELS, power(D // groups)),
    )  # fmt: skip
    return dy, sums.sum(0).to(weight.dtype)
