"""The numba form of stochastic rounding: the bits of torch.py in one pass over the state."""

import numpy as np
import torch
from numba import uint16, uint32
from torch import Tensor

from nanohybrid.ops.numba.jit import njit


def to_half(x: Tensor, key_S: Tensor, layer: int) -> Tensor:
    """As torch.to_half, bit for bit."""
    out = torch.empty(x.shape, dtype=torch.float16)
    flat = x.contiguous().view(torch.int32).view(len(x), -1).numpy().view(np.uint32)
    keys = key_S.numpy().view(np.uint32)
    _to_half(
        flat,
        keys,
        np.uint32(layer * 0x85EBCA6B % 2**32),
        out.view(torch.int16).view(len(x), -1).numpy().view(np.uint16),
    )
    return out


@njit
def _to_half(bits_SD: np.ndarray, key_S: np.ndarray, layer: int, out_SD: np.ndarray) -> None:
    for s in range(bits_SD.shape[0]):
        key = uint32(key_S[s] + layer)
        for d in range(bits_SD.shape[1]):
            word = uint32(uint32(d) * uint32(0x9E3779B1)) ^ key
            word = uint32((word ^ (word >> uint32(16))) * uint32(0x85EBCA6B))
            word = uint32((word ^ (word >> uint32(13))) * uint32(0xC2B2AE35))
            word = uint32((word ^ (word >> uint32(16))) & uint32(0x1FFF))
            bits = bits_SD[s, d]
            magnitude = uint32(bits & uint32(0x7FFFFFFF))
            if magnitude > uint32(0x7F800000):
                half = uint32(0x7E00)  # NaN
            elif magnitude >= uint32(0x477FE000):
                half = uint32(0x7BFF)  # 65504 and beyond
            elif magnitude >= uint32(0x38800000):
                half = uint32((magnitude + word - uint32(0x38000000)) >> uint32(13))
            elif magnitude < uint32(0x2B800000):
                half = uint32(word & uint32(0))  # below 2^-40: lost when 2^-14 is added in fp32
            else:  # below 2^-14, where fp16 has steps of 2^-24: units of 2^-37, then 13 random bits
                below = uint32(uint32(113) - (magnitude >> uint32(23)))
                whole = uint32((magnitude & uint32(0x7FFFFF)) | uint32(0x800000))
                units = uint32(whole >> below)
                rest = uint32(whole & uint32((uint32(1) << below) - uint32(1)))
                tie = uint32(uint32(1) << uint32(below - uint32(1)))
                if rest > tie or (rest == tie and units & uint32(1)):
                    units = uint32(units + uint32(1))
                half = uint32((units + word) >> uint32(13))
            out_SD[s, d] = uint16(half | ((bits >> uint32(16)) & uint32(0x8000)))
