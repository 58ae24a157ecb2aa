"""Rounding up or down with the probabilities that preserve the mean:  P(up) = (x - down) / (up - down).

A recurrent state in fp16 loses, at every step, all of an update that is smaller than half of its last bit:
rounding to nearest drops it each time. Stochastic rounding preserves it on average (docs/engine.md has the
drift of both).

fp16 has 10 of fp32's 23 fraction bits, so adding a random number of 13 bits and truncating rounds
stochastically, in integers. Below 2^-14 the steps of fp16 no longer shrink; 2^-14 is added first, so that the
steps are equally large. The random bits are the finalizer of MurmurHash3 over (element, key), and the key is
a hash of (seed, position, layer). Nothing depends on slots or on the batch.

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
    """An int32 for each (seed, position), uint64 of one shape: the upper half of splitmix64's finalizer."""
    with np.errstate(over="ignore"):
        return (
            (_mix(_mix(seeds + GOLDEN) + positions * GOLDEN) >> np.uint64(32))
            .astype(np.uint32)
            .view(np.int32)
        )


def to_half(x: Tensor, key_S: Tensor, layer: int) -> Tensor:
    """fp32 [S, ...] to fp16, unbiased.

    Representable numbers are unchanged; larger ones are clamped to fp16's largest.
    """
    size = x[0].numel()
    random_SD = _random(key_S, layer, size).view(x.shape)
    magnitude = x.abs().clamp(max=LARGEST)
    shift = torch.where(magnitude < SMALLEST, SMALLEST, 0.0)
    bits = (magnitude + shift).view(torch.int32)
    rounded = ((bits + random_SD) & ~BITS).view(torch.float32)
    return torch.copysign((rounded - shift).clamp(max=LARGEST), x).half()


def _random(key_S: Tensor, layer: int, size: int) -> Tensor:
    """int32 [S, D] of 13 random bits."""
    word = _element_hashes(size, key_S.device) ^ (key_S + _signed(layer * 0x85EBCA6B))[:, None]
    word = (word ^ (word >> 16 & 0xFFFF)) * _signed(0x85EBCA6B)
    word = (word ^ (word >> 13 & 0x7FFFF)) * _signed(0xC2B2AE35)
    return (word ^ (word >> 16 & 0xFFFF)) & BITS


@lru_cache(maxsize=4)
def _element_hashes(size: int, device: torch.device) -> Tensor:
    """A hash of each element's index, int32 [D]."""
    return torch.arange(size, dtype=torch.int32, device=device) * _signed(0x9E3779B1)


def _signed(word: int) -> int:
    """A 32-bit word as a signed integer."""
    word &= 2**32 - 1
    return word - 2**32 if word >= 2**31 else word


def _mix(word: np.ndarray) -> np.ndarray:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
