"""The scales of int4: for each group the one of a small grid that leaves the least squared error.

A group's largest number m is put on code 0, that is on -8: scale = -m / 8. That wastes nothing of the range, but the largest
number is one of 32, and a scale a little smaller rounds the others finer and clips that one; a little larger moves it to 7.
So for each divisor d of DIVISORS:

    1. q = clamp(round(-w d / m), -8, 7)                codes under the scale s = -m / d
    2. s = sum(h w q) / sum(h q^2)                      the best scale for these codes
    3. error = sum(h (w - s q)^2)                       smaller than the best so far? keep s

Then the kept scale is rounded to bf16 and the codes are made anew, for that is what is stored. h weighs the columns: 1, or the
mean square of what enters them in use (`importance`), since the output's error is the sum of h (w - s q)^2 where inputs are
uncorrelated.

N outputs, K inputs, G groups of a row, D weights of a group.
"""

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 7
DIVISORS = (7.0, 7.3, 7.6, 8.0, 8.3, 8.6, 9.0, 9.4, 9.8)  # a hundred of them gain 0.1 % more: docs/log.md
SMALLEST = torch.finfo(torch.bfloat16).tiny


def best_scales(w_NGD: Tensor, h_GD: Tensor | None = None) -> Tensor:
    """The scale of each group of w (fp32), [N, G] in fp32; of a group of zeros the smallest normal number."""
    extreme_NG1 = w_NGD.gather(-1, w_NGD.abs().argmax(-1, keepdim=True))
    best_NG = torch.zeros(w_NGD.shape[:2], device=w_NGD.device)
    gain_NG = torch.zeros_like(best_NG)  # sum(h w^2) - error: what of the group the codes explain
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
