"""The FP8 recipe of the paper (after DeepSeek-V3), explained.

**The format.** E4M3 has one sign bit, four exponent bits and three fraction bits. The largest number is 448,
the smallest normal one 2^-6, the smallest of all 2^-9. Neighbors differ by at most an eighth of the number,
so rounding costs at most 1/16 of it. There is no infinity: overflow gives NaN. The problem is range, not
precision: 448 / 2^-9 is only 17 powers of two.

**Scales.** Therefore each small group of numbers has its own scale in fp32, computed online from the current
numbers:

    scale = max |x| / 448        q = e4m3(x / scale)        x ~ q scale

The group's largest element becomes exactly 448; elements 2^-15 times smaller are still not zero. The scale is
applied *before* rounding, so q uses the whole range whatever the size of x. A group of zeros gets the
smallest scale allowed. A group with an infinity or a NaN becomes NaN as a whole: saturation would hide it,
and the training loop stops on NaN.

**Groups.** One outlier costs its whole group precision, so groups are small along the axis that a product
sums over:
- activations and gradients: tiles of 1 x 128, one token (row) and 128 channels;
- weights: blocks of 128 x 128, since a weight's outliers are mild and a square block serves both W and its
  transpose.

**Three products of a linear layer, each with operands grouped along its own sum.** x is [T, I], W is [O, I],
dy is [T, O]:

    y  = x W^T        sums over I        x in tiles along I,      W in blocks
    dx = dy W         sums over O        dy in tiles along O,     W in the same blocks
    dW = dy^T x       sums over T        dy^T and x^T in tiles along T: 128 tokens of a channel share a scale

So x and dy are quantized twice, along either axis, always from their unquantized values. Products of two e4m3
numbers are exact in fp32. Their sums over one group of 128 are fp32, multiplied by both groups' scales, and
added up in fp32.

Master weights, optimizer states and everything that is not such a product (norms, scan, softmax, residuals)
stay unchanged.
"""

import torch
from torch import Tensor

GROUP = 128
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_AMAX = (
    1e-30  # of a group of zeros: below any gradient, with a scale that is still a normal fp32 number
)


def quantize(group: Tensor) -> tuple[Tensor, Tensor]:
    """One group of numbers, of any shape: its e4m3 values and its scale."""
    scale = (group.float().abs().max().clamp_min(SMALLEST_AMAX)) / LARGEST
    return (group.float() / scale).to(E4M3), scale


def fake_quantize(x: Tensor, rows: int, columns: int) -> Tensor:
    """x quantized and dequantized, by groups of rows x columns; groups at the edges are smaller."""
    result = torch.empty_like(x)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            group = slice(top, top + rows), slice(left, left + columns)
            q, scale = quantize(x[group])
            result[group] = (q.float() * scale).to(x.dtype)
    return result


def forward(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """y = x W^T."""
    return fake_quantize(x_TI, 1, GROUP) @ fake_quantize(weight_OI, GROUP, GROUP).T


def input_gradient(dy_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """dx = dy W."""
    return fake_quantize(dy_TO, 1, GROUP) @ fake_quantize(weight_OI, GROUP, GROUP)


def weight_gradient(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
    """dW = dy^T x."""
    return fake_quantize(dy_TO.T, 1, GROUP) @ fake_quantize(x_TI.T, 1, GROUP).T
