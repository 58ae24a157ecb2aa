"""Bytes of weights, keys and values, and states, from what the layers declare; nothing is allocated.

Binary units: 1 GiB = 2^30 bytes. Activations and the allocator's reserve are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from nanohybrid.config import HybridConfig
from nanohybrid.model.quantized import quantizable, quantized_names
from nanohybrid.model.spec import cache_specs, param_specs, part_label
from nanohybrid.ops.quantized import stored_bytes


@dataclass(frozen=True)
class Footprint:
    """Memory of a model: weights, bytes per token of context, and bytes per sequence."""

    parameters: int
    parameters_by_part: dict[str, int]
    weight_bytes: int
    kv_bytes_per_token: int
    state_bytes_per_sequence: int

    @classmethod
    def of(
        cls,
        config: HybridConfig,
        dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        format: str | None = None,
        quantize_head: bool = True,
    ) -> Footprint:
        """Count with weights, keys, values and conv inputs in `dtype`, and SSM states in fp32.

        state_dtype, kv_dtype: override the dtypes of states, and of keys and values. format: int8, int4 or
        fp8 for the matrices that model/quantized.py quantizes, with or without the head; the rest stays in
        `dtype`.
        """
        by_part: dict[str, int] = {}
        for declared in param_specs(config).values():
            part = part_label(declared.part)
            by_part[part] = by_part.get(part, 0) + prod(declared.shape)
        stored = [
            one for layer in cache_specs(config, dtype, state_dtype, kv_dtype) for one in layer.values()
        ]
        total = sum(by_part.values())
        return cls(
            parameters=total,
            parameters_by_part=by_part,
            weight_bytes=total * dtype.itemsize
            - (0 if format is None else saved_bytes(config, dtype, format, quantize_head)),
            kv_bytes_per_token=sum(one.bytes for one in stored if one.per_token),
            state_bytes_per_sequence=sum(one.bytes for one in stored if not one.per_token),
        )

    def sequence_bytes(self, context: int) -> int:
        """Bytes of one sequence of `context` tokens."""
        return self.state_bytes_per_sequence + context * self.kv_bytes_per_token

    def total(self, context: int, batch: int = 1) -> int:
        """Bytes of the weights and of `batch` sequences."""
        return self.weight_bytes + batch * self.sequence_bytes(context)

    def max_context(self, budget: int, batch: int = 1) -> int | None:
        """The longest context that fits `budget` bytes; 0 if none does, None if it is unbounded (no
        attention).
        """
        left = budget - self.weight_bytes - batch * self.state_bytes_per_sequence
        if left < 0:
            return 0
        return left // (batch * self.kv_bytes_per_token) if self.kv_bytes_per_token else None

    def max_batch(self, budget: int, context: int) -> int:
        """The most sequences of `context` tokens that fit `budget` bytes."""
        each = self.sequence_bytes(context)
        return max(0, (budget - self.weight_bytes) // each) if each else 0


def saved_bytes(config: HybridConfig, dtype: torch.dtype, format: str, quantize_head: bool = True) -> int:
    """Bytes that quantizing the matrices saves."""
    sizes = quantizable(config)
    matrices = [sizes[name] for name in quantized_names(config, format, quantize_head)]
    return sum(prod(matrix) * dtype.itemsize - stored_bytes(format, *matrix) for matrix in matrices)
