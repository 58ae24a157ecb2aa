"""The values of GGUF's quantized blocks, in fp32.

    w = d q           Q8_0 (q from -128), Q4_0 (code - 8), Q5_0 (code - 16)
    w = d q + m       Q4_1, Q5_1
    w = d s q - e n   Q4_K, Q5_K: 8 groups of 32 with 6-bit scales s and minima n
    w = d s q         Q6_K: 16 groups of 16 with 8-bit scales s; q from -32

d, m and e are fp16. The products are formed in the order of the gguf package, so the bits are equal to its
own. Format: ggml-quants.c of the ggml project.

B blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanohybrid.gguf.kinds import FLOATS, KINDS

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GROUP = 32  # weights of a group of Q4_K and Q5_K


def values(raw: Tensor, kind: str) -> Tensor:
    """The weights of whole blocks, flat and in fp32; F32, F16 and BF16 keep their type.

    raw: uint8, flat, a multiple of the block's bytes.
    """
    if kind in FLOATS:
        return raw.view(DTYPES[kind])
    return _FORMS[kind](raw.view(-1, KINDS[kind].bytes)).flatten()


def _half(block: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of each block, [B, 1] in fp32."""
    return block[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """[B, n] bytes -> [B, 2 n]: all low halves, then all high halves."""
    return torch.cat([codes & 15, codes >> 4], dim=1)


def _bits(masks: Tensor) -> Tensor:
    """[B, 4] bytes, 32 bits with the lowest first -> [B, 32] of 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((masks[:, :, None] >> shifts) & 1).flatten(1) << 4


def _q8_0(block: Tensor) -> Tensor:
    return block[:, 2:].contiguous().view(torch.int8).float() * _half(block, 0)


def _q4_0(block: Tensor) -> Tensor:
    return (_nibbles(block[:, 2:]).float() - 8) * _half(block, 0)


def _q4_1(block: Tensor) -> Tensor:
    return _nibbles(block[:, 4:]).float() * _half(block, 0) + _half(block, 2)


def _q5_0(block: Tensor) -> Tensor:
    return ((_nibbles(block[:, 6:]) | _bits(block[:, 2:6])).float() - 16) * _half(block, 0)


def _q5_1(block: Tensor) -> Tensor:
    return (_nibbles(block[:, 8:]) | _bits(block[:, 4:8])).float() * _half(block, 0) + _half(block, 2)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and minima of the 8 groups, [B, 8] each in fp32, from 12 bytes.

    Bytes 0 to 3 have scales 0 to 3, bytes 4 to 7 the minima; their two upper bits, and bytes 8 to 11, have
    the rest.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1)
    return scales.float(), minima.float()


def _k_groups(block: Tensor, codes: Tensor) -> Tensor:
    """Scaled codes [B, 8, 32] of Q4_K and Q5_K."""
    scales, minima = _scales_and_minima(block[:, 4:16])
    d, low = _half(block, 0) * scales, _half(block, 2) * minima
    return d[:, :, None] * codes.float() - low[:, :, None]


def _q4_k(block: Tensor) -> Tensor:
    packed = block[:, 16:].reshape(-1, 4, 1, GROUP)
    return _k_groups(block, torch.cat([packed & 15, packed >> 4], dim=2).view(-1, 8, GROUP))


def _q5_k(block: Tensor) -> Tensor:
    packed = block[:, 48:].reshape(-1, 4, 1, GROUP)
    low = torch.cat([packed & 15, packed >> 4], dim=2).view(-1, 8, GROUP)
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (block[:, 16:48].reshape(-1, 1, GROUP) >> shifts) & 1
    return _k_groups(block, low | (high << 4))


def _q6_k(block: Tensor) -> Tensor:
    low = block[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], dim=2).view(-1, 8, GROUP)  # halves of 128: codes 0-31 .. 96-127
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = ((block[:, 128:192].reshape(-1, 2, 1, GROUP) >> shifts) & 3).view(-1, 8, GROUP)
    codes = (low | (high << 4)).view(-1, 16, 16).float() - 32
    scales = block[:, 192:208].contiguous().view(torch.int8).float()
    return (_half(block, 208) * scales)[:, :, None] * codes


_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}  # fmt: skip
