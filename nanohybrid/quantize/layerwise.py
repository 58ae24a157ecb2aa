"""Quantizing a checkpoint from disk to disk, one layer at a time, and what that changed.

With documents they are carried through both models (carry.py): scales of int4 weigh their errors by what enters each column, and the
result says how far the outputs moved. Without, the matrices are quantized by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nanohybrid.checkpoint import CheckpointReader, CheckpointWriter
from nanohybrid.model.mixers.base import linear
from nanohybrid.model.quantized import (
    QuantizedLinear,
    quantizable,
    quantized_linear,
    quantized_names,
    replace,
)
from nanohybrid.model.spec import param_specs, part_label
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.layerwise import EMBEDDINGS, HEAD, Stored
from nanohybrid.quantize.calibrate import Carried, Quality

Advance = Callable[[int], object]


@dataclass
class Quantization:
    """What was done: bytes of each kind of layer before and after, the error of each matrix relative to its size, matrices that
    stayed as they were because the format has no form for them, and the quality where there were documents."""

    format: str
    bytes_before: dict[str, int] = field(default_factory=dict)
    bytes_after: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    quality: Quality | None = None


def quantize_checkpoint(
    source: Path,
    format: str,
    directory: Path,
    documents: Calibration | None = None,
    advance: Advance | None = None,
    device: str = "cpu",
) -> Quantization:
    """Quantize the checkpoint `source` into `directory`, working on a device; memory for a layer, a matrix' work, and the documents'
    hidden states.

    Raises CheckpointError, or InputError for weights that cannot be quantized.
    """
    with CheckpointReader(source) as reader:
        chosen = quantized_names(reader.config, format)
        dtypes = {name: reader.dtype(name) for name in reader.names()}
        with CheckpointWriter(
            directory, reader.config, dtypes, assets=source, formats=dict.fromkeys(chosen, format)
        ) as writer:
            return _Work(reader, writer, format, set(chosen), advance, device).run(documents)


class _Work:
    def __init__(
        self,
        reader: CheckpointReader,
        writer: CheckpointWriter,
        format: str,
        chosen: set[str],
        advance: Advance | None,
        device: str,
    ) -> None:
        self.reader, self.writer, self.format, self.chosen, self.advance = (
            reader,
            writer,
            format,
            chosen,
            advance,
        )
        self.device = device
        self.declared = param_specs(reader.config)
        self.found = Quantization(
            format, kept=[name for name in quantizable(reader.config) if name not in chosen]
        )

    def run(self, documents: Calibration | None) -> Quantization:
        """Layers first, one after another, then what belongs to none of them."""
        parts = Stored(self.reader, self.reader.common_dtype, self.device)
        carried = None if documents is None else Carried.of(parts, documents, learn=self.format == "int4")
        if carried is None:
            for name in self.reader.names():
                self.store(name)
            return self.found
        for index, block in enumerate(parts.blocks()):
            carried.through(block, partial(self.layer, block, index))
        head_inputs = carried.normed(parts.final_norm())
        for name in [
            name for name, declared in self.declared.items() if declared.layer is None and name != HEAD
        ]:
            self.store(name)
        before = self.head(HEAD if HEAD in self.declared else EMBEDDINGS)
        after = (self.store(HEAD, head_inputs) if HEAD in self.declared else None) or before
        self.found.quality, self.found.drift = carried.compared(before, after), carried.drift
        return self.found

    def layer(self, block: nn.Module, index: int, squares: dict[str, Tensor]) -> None:
        """Store the tensors of a layer, and put what was quantized into `block`."""
        prefix = f"backbone.layers.{index}."
        for name in [name for name, declared in self.declared.items() if declared.layer == index]:
            path = name.removeprefix(prefix).removesuffix(".weight")
            quantized = self.store(name, squares.get(path))
            if quantized is not None:
                replace(block, path, quantized)

    def head(self, name: str) -> nn.Module:
        """The original's head."""
        weight = self.reader.tensor(name, self.reader.common_dtype, self.device)
        with torch.device("meta"):
            module = linear(weight.shape[1], weight.shape[0])
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    def store(self, name: str, importance_K: Tensor | None = None) -> QuantizedLinear | None:
        """Store one tensor, as codes where it is one of those; returns them."""
        tensor = self.reader.tensor(name, device=self.device)
        quantized = quantized_linear(name, tensor, self.format, importance_K) if name in self.chosen else None
        if quantized is None:
            self.writer.write(name, tensor)
            after = tensor.nbytes
        else:
            self.writer.write_codes(name, quantized.codes, quantized.scales)
            after = quantized.codes.nbytes + quantized.scales.nbytes
            self.found.errors[name] = _error(quantized, tensor)
        kind = part_label(self.declared[name].part)
        for table, count in ((self.found.bytes_before, tensor.nbytes), (self.found.bytes_after, after)):
            table[kind] = table.get(kind, 0) + count
        if self.advance is not None:
            self.advance(1)
        return quantized


def _error(quantized: QuantizedLinear, weight: Tensor) -> float:
    """The norm of the difference over the norm, a slice of rows at a time."""
    difference = size = 0.0
    for codes, scales, part in zip(
        *(tensor.split(4096) for tensor in (quantized.codes, quantized.scales, weight)), strict=True
    ):
        exact = part.float()
        difference += float((QuantizedLinear(codes, scales).weight - exact).square().sum())
        size += float(exact.square().sum())
    return float((difference / max(size, 1e-30)) ** 0.5)
