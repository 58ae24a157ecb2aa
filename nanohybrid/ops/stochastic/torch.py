"""Round up or down with the probabilities that keep the mean:  P(up) = (x - down) / (up - down).

A recurrent state in fp16 loses, at every step, all of an update that is smaller than half of its last bit: rounding to nearest
drops it each time, stochastic rounding keeps it on average (docs/engine.md has the drift of both).

fp16 keeps 10 bits of fp32's 23, so that a random number of 13 bits added below and cut off there does it, in integers. Below
2^-14 fp16's steps no longer shrink; adding 2^-14 first brings the number to where they are as large. The random bits are the
finalizer of murmur3 over (element, key), the key a hash of (seed, position, layer): nothing depends on slots or on the batch.

S sequences · D elements of one sequence's state.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BITS = (1 << 13) - 1
SMALLEST = 2.0**-14  # the smallest normal number of fp16
LARGEST = 65504.0
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """An int32 for each (seed, position), both uint64 and of one shape: splitmix64's finalizer, its upper half."""
    with np.errstate(over="ignore"):
        return (
            (_mix(_mix(seeds + GOLDEN) + positions * GOLDEN) >> np.uint64(32))
            .astype(np.uint32)
            .view(np.int32)
        )


def to_half(x: Tensor, key_S: Tensor, layer: int) -> Tensor:
    """[S, ...] in fp32 to fp16, unbiased; what fp16 can hold stays as it is, and what exceeds it is cut to its largest number."""
    size = x[0].numel()
    random_SD = _random(key_S, layer, size).view(x.shape)
    magnitude = x.abs().clamp(max=LARGEST)
    shift = torch.where(magnitude < SMALLEST, SMALLEST, 0.0)
    bits = (magnitude + shift).view(torch.int32)
    rounded = ((bits + random_SD) & ~BITS).view(torch.float32)
    return torch.copysign((rounded - shift).clamp(max=LARGEST), x).half()


def _random(key_S: Tensor, layer: int, size: int) -> Tensor:
    """[S, D] of 13 random bits."""
    word = _places(size, key_S.device) ^ (key_S + _signed(layer * 0x85EBCA6B))[:, None]
    word = (word ^ (word >> 16 & 0xFFFF)) * _signed(0x85EBCA6B)
    word = (word ^ (word >> 13 & 0x7FFFF)) * _signed(0xC2B2AE35)
    return (word ^ (word >> 16 & 0xFFFF)) & BITS


@lru_cache(maxsize=4)
def _places(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, dtype=torch.int32, device=device) * _signed(0x9E3779B1)


def _signed(word: int) -> int:
    word &= 2**32 - 1
    return word - 2**32 if word >= 2**31 else word


def _mix(word: np.ndarray) -> np.ndarray:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
