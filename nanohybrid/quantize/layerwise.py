"""Quantizing a checkpoint from disk to disk, one layer at a time, and measuring what that changed.

With documents, both models run on them (calibrate.py): the scales of int4 weight their errors by the inputs
of each column, and the result says how far the outputs moved. Without documents, the matrices are quantized
by themselves.
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
from nanohybrid.prune.layerwise import EMBEDDINGS, HEAD, StreamedModel
from nanohybrid.quantize.calibrate import PairedForward, QuantizationQuality

Advance = Callable[[int], object]


@dataclass
class Quantization:
    """What quantizing did.

    bytes_before, bytes_after: of the tensors in the files, by kind of layer. errors: of each matrix, relative
    to its norm. unquantized: matrices that stay as they are because the format cannot hold their rows. drift:
    relative difference of the hidden states after each layer. drift and quality: only where there were
    documents.
    """

    format: str
    bytes_before: dict[str, int] = field(default_factory=dict)
    bytes_after: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unquantized: list[str] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    quality: QuantizationQuality | None = None


def quantize_checkpoint(
    source: Path,
    format: str,
    directory: Path,
    documents: Calibration | None = None,
    advance: Advance | None = None,
    device: str = "cpu",
    quantize_head: bool = False,
) -> Quantization:
    """Quantize the checkpoint `source` into `directory`.

    format: int8, int4 or fp8. documents: as above. advance: called with 1 after each tensor. device: where it
    computes. quantize_head: an untied head too. Memory: one layer, the work on one matrix, and the documents'
    hidden states. Raises CheckpointError, or InputError for weights that cannot be quantized.
    """
    with CheckpointReader(source) as reader:
        chosen = quantized_names(reader.config, format, quantize_head)
        dtypes = {name: reader.dtype(name) for name in reader.names()}
        with CheckpointWriter(
            directory, reader.config, dtypes, assets=source, formats=dict.fromkeys(chosen, format)
        ) as writer:
            return _Quantizer(reader, writer, format, set(chosen), advance, device).run(documents)


class _Quantizer:
    def __init__(
        self,
        reader: CheckpointReader,
        writer: CheckpointWriter,
        format: str,
        chosen: set[str],
        advance: Advance | None,
        device: str,
    ) -> None:
        self.reader, self.writer, self.device = reader, writer, device
        self.format, self.chosen, self.advance = format, chosen, advance
        self.specs = param_specs(reader.config)
        self.found = Quantization(
            format,
            unquantized=[name for name in quantizable(reader.config) if name not in {*chosen, HEAD}],
        )

    def run(self, documents: Calibration | None) -> Quantization:
        """Layers first, one after another, then the tensors outside the layers."""
        model = StreamedModel(self.reader, self.reader.common_dtype, self.device)
        if documents is None:
            for name in self.reader.names():
                self.store(name)
            return self.found
        pair = PairedForward.of(model, documents, calibrate=self.format == "int4")
        for index, block in enumerate(model.blocks()):
            pair.run_layer(block, partial(self.layer, block, index))
        head_inputs = pair.run_norm(model.final_norm())
        for name in [name for name, spec in self.specs.items() if spec.layer is None and name != HEAD]:
            self.store(name)
        before = self.head(HEAD if HEAD in self.specs else EMBEDDINGS)
        after = (self.store(HEAD, head_inputs) if HEAD in self.specs else None) or before
        self.found.quality, self.found.drift = pair.compare(before, after), pair.drift
        return self.found

    def layer(self, block: nn.Module, index: int, squares: dict[str, Tensor]) -> None:
        """Store the tensors of a layer, and put the quantized matrices into `block`."""
        prefix = f"backbone.layers.{index}."
        for name in [name for name, spec in self.specs.items() if spec.layer == index]:
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
        """Store one tensor; returns its codes where it is quantized. importance_K: mean squares of the inputs
        of its columns."""
        tensor = self.reader.tensor(name, device=self.device)
        quantized = quantized_linear(name, tensor, self.format, importance_K) if name in self.chosen else None
        if quantized is None:
            self.writer.write(name, tensor)
        else:
            self.writer.write_codes(name, quantized.codes, quantized.scales)
            self.found.errors[name] = _error(quantized, tensor)
        kind = part_label(self.specs[name].part)
        before, after = self.reader.stored_bytes_of(name), self.writer.stored_bytes_of(name)
        for table, count in ((self.found.bytes_before, before), (self.found.bytes_after, after)):
            table[kind] = table.get(kind, 0) + count
        if self.advance is not None:
            self.advance(1)
        return quantized


def _error(quantized: QuantizedLinear, weight: Tensor) -> float:
    """The norm of the difference relative to the norm of the weight, computed in slices of rows."""
    difference = size = 0.0
    for codes, scales, part in zip(
        *(tensor.split(4096) for tensor in (quantized.codes, quantized.scales, weight)), strict=True
    ):
        exact = part.float()
        difference += float((QuantizedLinear(codes, scales).weight - exact).square().sum())
        size += float(exact.square().sum())
    return float((difference / max(size, 1e-30)) ** 0.5)
