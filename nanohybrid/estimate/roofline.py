"""Roofline of one decode step, from shapes alone.

    bytes = weights without the embedding table + batch (context x KV of a token + 2 x states + KV of the new
    token) FLOPs = batch (2 x weights that are multiplied + 4 heads x head dim x context in each attention
    layer + 5 x SSM state) seconds = max(bytes / bandwidth, FLOPs / peak)

Weights are read once per step for any batch. A state is read and written. An untied embedding table is only
looked up. A matmul works on tiles of 128 weight rows, and a partial tile takes the time of a full one.
Nothing else is counted, so the result is an upper bound on speed. The best published figure reaches 81 % of
it (single stream, RTX 3090); the paper's three candidates reach 68 to 70 %.

Accuracy of differences: the three candidates were measured at 161.02, 156.42 and 155.86 tok/s. The roofline
gives 230.4, 227.9 and 227.8, in the same order; the last two differ by 0.06 %. Without tiles, or with tiles
of 64 or 256, those two change places.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from nanohybrid.config import HybridConfig
from nanohybrid.estimate.budget import DTYPES, QUANTIZED, Budget, matrix_bytes, weight_bytes
from nanohybrid.estimate.devices import Device
from nanohybrid.estimate.footprint import Footprint
from nanohybrid.estimate.linear_shapes import every_matrix

TILE = 128


@dataclass(frozen=True)
class Step:
    """One decode step of a batch: bytes read and written, and FLOPs."""

    bytes: int
    flops: int
    batch: int

    def seconds(self, device: Device) -> float:
        return max(self.bytes / device.bandwidth, self.flops / device.flops)

    def tokens_per_second(self, device: Device) -> float:
        """Tokens/s of all sequences together, an upper bound."""
        return self.batch / self.seconds(device)


def decode_step(config: HybridConfig, budget: Budget, tile: int = TILE) -> Step:
    """A step in which every sequence of the budget has its full context.

    tile: rows of a matmul tile; 1 counts no padding.
    """
    dtype = budget.dtype
    kind = DTYPES["bf16" if dtype in QUANTIZED else dtype]
    footprint = Footprint.of(config, kind)
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    weights = (
        weight_bytes(config, dtype, budget.quantize_head)
        - table * kind.itemsize
        + sum(
            count
            * (
                matrix_bytes((ceil(rows / tile) * tile, columns), dtype)
                - matrix_bytes((rows, columns), dtype)
            )
            for (rows, columns), count in every_matrix(config)
        )
    )
    kv = footprint.kv_bytes_per_token
    sequence = budget.context * kv + 2 * footprint.state_bytes_per_sequence + kv
    mixing = sum(mixer.mixing_flops(config, 1, budget.context) for mixer in config.mixers)
    token = 2 * (footprint.parameters - table) + mixing
    return Step(weights + budget.batch * sequence, budget.batch * token, budget.batch)
