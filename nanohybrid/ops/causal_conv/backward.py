"""The gradient of the causal convolution and of the SiLU that may follow it, as one Triton kernel.

    dx_t = sum_k weight[:, W-1-k] dp_{t+k}      dweight[:, W-1-k] = sum_t dp_t x_{t-k}      dbias = sum_t dp_t
    dp = dy, or with the SiLU   dp = dy s (1 + p (1 - s)),  s = sigmoid(p),  p the convolution's result

over neighbors of the same sequence, with p recomputed from x. Each tile reads x and dy once from memory (the
shifted rows come from the cache). It stores its own sums for weight and bias, which are then added up in a
fixed order: no atomics, so the bits are the same every time.

T tokens · C channels · W window · k distance, 0 to W - 1.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.launch import cdiv, contiguous_rows
from nanohybrid.ops.layout import Layout

# Of a tile. The sums for W weights and a bias are then a sixth of a bf16 x and an fp32 dy.
TOKENS, CHANNELS = 32, 128


@triton.jit
def _before_silu(x, weight, bias, at, c, earlier, inside, stride_x, C, SHIFT: tl.constexpr, W: tl.constexpr):
    """The convolution's result for the token SHIFT positions after each row of the tile."""
    total = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(W):
        x_k = tl.load(
            x + (at + SHIFT - k) * stride_x + c[None, :],
            mask=inside & (earlier + SHIFT >= k)[:, None],
            other=0.0,
        )
        total += (
            x_k.to(tl.float32)
            * tl.load(weight + c * W + (W - 1 - k), mask=c < C, other=0.0).to(tl.float32)[None, :]
        )
    return total


@triton.jit
def conv_gradients(
    dy, x, weight, bias, before, after, dx, tile_sums, stride_x, T, C,
    W: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx [T, C]; tile_sums [tiles, W + 1, C]: each tile's part of dweight by distance k, then of dbias."""
    tile = tl.program_id(0)
    t, c = tile * TOKENS + tl.arange(0, TOKENS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at, columns = t.to(tl.int64)[:, None], c[None, :]
    is_token, is_channel = t < T, c < C
    earlier, later = tl.load(before + t, mask=is_token, other=0), tl.load(after + t, mask=is_token, other=0)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for k in tl.static_range(W):
        inside = (is_token & (later >= k))[:, None] & is_channel[None, :]
        dp = tl.load(dy + (at + k) * C + columns, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            p = _before_silu(x, weight, bias, at, c, earlier, inside, stride_x, C, k, W)
            sigmoid = tl.sigmoid(p)
            dp *= sigmoid * (1.0 + p * (1.0 - sigmoid))
        if k == 0:
            dp_t = dp
        total += (
            dp * tl.load(weight + c * W + (W - 1 - k), mask=is_channel, other=0.0).to(tl.float32)[None, :]
        )
    tl.store(
        dx + at * C + columns, total.to(dx.dtype.element_ty), mask=is_token[:, None] & is_channel[None, :]
    )
    out = tile_sums + tile.to(tl.int64) * (W + 1) * C + c
    for k in tl.static_range(W):
        inside_x = (is_token & (earlier >= k))[:, None] & is_channel[None, :]
        x_k = tl.load(x + (at - k) * stride_x + columns, mask=inside_x, other=0.0).to(tl.float32)
        tl.store(out + k * C, tl.sum(dp_t * x_k, 0), mask=is_channel)
    tl.store(out + W * C, tl.sum(dp_t, 0), mask=is_channel)


def causal_conv_backward(
    dy_TC: Tensor, x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor, layout: Layout, silu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in the dtypes of x, weight and bias, for sequences that begin with zeros."""
    (T, C), W = x_TC.shape, weight_CW.shape[1]
    dy, x, weight = dy_TC.contiguous(), contiguous_rows(x_TC), weight_CW.contiguous()
    tiles = cdiv(T, TOKENS)
    dx = torch.empty((T, C), dtype=x.dtype, device=x.device)
    tile_sums = torch.empty((tiles, W + 1, C), dtype=torch.float32, device=x.device)
    before = layout.tensor("before", x.device, layout.offsets)
    after = layout.tensor(
        "after",
        x.device,
        lambda: np.repeat(np.asarray(layout.lengths), layout.lengths) - 1 - layout.offsets(),
    )
    conv_gradients[tiles, cdiv(C, CHANNELS)](
        dy,
        x,
        weight,
        bias_C,
        before,
        after,
        dx,
        tile_sums,
        x.stride(0),
        T,
        C,
        W=W,
        SILU=silu,
        TOKENS=TOKENS,
        CHANNELS=CHANNELS,
        num_warps=8,
    )
    total = tile_sums.sum(0)
    return dx, total[:W].flip(0).T.to(weight_CW.dtype), total[W].to(bias_C.dtype)
