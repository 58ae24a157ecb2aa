"""The scales of int4: for each group, the scale of a small grid with the least squared error.

With the group's largest-magnitude weight m at code 0, that is at -8, the scale is -m / 8. That uses the whole
range. But m is only one of 32 weights: a slightly smaller scale clips m and rounds the others more finely, a
slightly larger one moves m to 7. So for each divisor d of DIVISORS:

    1. q = clamp(round(-w d / m), -8, 7)                codes under the scale s = -m / d
    2. s = sum(h w q) / sum(h q^2)                      the best scale for these codes
    3. error = sum(h (w - s q)^2)                       keep s if the error is the smallest so far

The chosen scale is rounded to bf16, as it is stored, and the codes are computed again under it. h weights the
columns: 1, or the mean square of their inputs in use (`importance`), since the output's error is the sum of h
(w - s q)^2 where inputs are uncorrelated.

N outputs, K inputs, G groups of a row, D weights of a group.
"""

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 7
DIVISORS = (
    7.0,
    7.3,
    7.6,
    8.0,
    8.3,
    8.6,
    9.0,
    9.4,
    9.8,
)  # a hundred divisors reduce the error by 0.1 % more (docs/log.md)
SMALLEST = torch.finfo(torch.bfloat16).tiny


def best_scales(w_NGD: Tensor, h_GD: Tensor | None = None) -> Tensor:
    """The scale of each group of w (fp32), [N, G] in fp32.

    For a group of zeros, the smallest normal number.
    """
    extreme_NG1 = w_NGD.gather(-1, w_NGD.abs().argmax(-1, keepdim=True))
    best_NG = torch.zeros(w_NGD.shape[:2], device=w_NGD.device)
    gain_NG = torch.zeros_like(best_NG)  # sum(h w^2) - error
    inverse_NG1 = torch.where(extreme_NG1 == 0, 0.0, -1.0 / extreme_NG1)
    for divisor in DIVISORS:
        q_NGD = codes_under(w_NGD, inverse_NG1 * divisor)
        hq_NGD = q_NGD if h_GD is None else q_NGD * h_GD
        wq_NG, qq_NG = (hq_NGD * w_NGD).sum(-1), (hq_NGD * q_NGD).sum(-1)
        scale_NG = wq_NG / qq_NG
        better_NG = scale_NG * wq_NG > gain_NG  # false for 0 / 0
        gain_NG = torch.where(better_NG, scale_NG * wq_NG, gain_NG)
        best_NG = torch.where(better_NG, scale_NG, best_NG)
    return torch.where(best_NG.abs() < SMALLEST, SMALLEST, best_NG)


def codes_under(w_NGD: Tensor, inverse_NG1: Tensor) -> Tensor:
    """The nearest of -8 ... 7 to w / scale, as fp32."""
    return (w_NGD * inverse_NG1).round_().clamp_(LOWEST, HIGHEST)
