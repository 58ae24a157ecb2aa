"""Conversion of our quantized weights to llama.cpp's blocks of 32 without quantizing again, so values do not
change.

    q8_0    fp16 scale | 32 signed bytes                       our int8; a group of 128 is four blocks with
            one scale
    q4_0    fp16 scale | 16 bytes, byte j: codes j and j + 16  our int4; byte j has codes 2j and 2j + 1

A 4-bit value is (code - 8) scale in both. A bf16 scale of 2^-17 or more is exact in fp16 (8 significant bits,
smallest step 2^-24).

N rows · B blocks of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
SAME = {"int8": "Q8_0", "int4": "Q4_0"}


def matches(format: str, group: int, kind: str) -> bool:
    """Whether a matrix of this format, `group` weights to a scale, can be stored as `kind` with the same
    values."""
    return SAME.get(format) == kind and group % BLOCK == 0


def repack(codes: Tensor, scales_NG: Tensor) -> Tensor:
    """The bytes of the blocks, a flat uint8 tensor, from int8 codes [N, K] or int4 codes [N, K / 2] and
    scales [N, G]."""
    rows = codes.shape[0]
    if codes.dtype == torch.int8:
        codes_NB = codes.view(torch.uint8).reshape(rows, -1, BLOCK)
    else:
        even_odd = torch.stack([codes & 15, codes >> 4], dim=-1)
        low, high = even_odd.reshape(rows, -1, 2, BLOCK // 2).unbind(2)
        codes_NB = low | (high << 4)
    blocks = codes_NB.shape[1]
    scales_NB = scales_NG.repeat_interleave(blocks // scales_NG.shape[1], dim=1).to(torch.float16)
    return torch.cat([scales_NB[..., None].view(torch.uint8), codes_NB], dim=-1).flatten()
