"""The layout of each quantized matrix of a checkpoint, found from its tensors."""

from __future__ import annotations

from collections.abc import Mapping

from nanohybrid.checkpoint.header import FLOATS, Entry
from nanohybrid.checkpoint.quantized import columns, floats, integers, written
from nanohybrid.checkpoint.quantized.matrix import Layout, MatrixEntry, wrong
from nanohybrid.checkpoint.quantized.settings import AWQ, Settings

PARTS = (
    written.PLAIN, written.PACKED, written.SCALE, written.SHAPE, integers.ZERO_POINT, integers.ORDER,
    floats.INVERSE, floats.SECOND, floats.GLOBAL,
    columns.WEIGHT, columns.ZEROS, columns.SCALES, columns.ORDER,
)  # fmt: skip
ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale", "q_scale",
    "k_zero_point", "v_zero_point", "q_zero_point",
)  # fmt: skip
"""Of activations and KV caches: known, and not used."""


def take_matrices(
    named: dict[str, Entry], sizes: Mapping[str, tuple[int, int]], settings: Settings
) -> dict[str, MatrixEntry]:
    """Remove the tensors of quantized matrices from `named`, and return the matrices by name.

    named: the tensors of the files by the model's names. sizes: [out, in] of the matrices that may be
    quantized. Raises CheckpointError, naming file and tensor, for a layout that is unknown or does not fit.
    """
    found = {}
    for name, shape in sizes.items():
        owner = name.removesuffix(written.PLAIN)
        parts = {part: named[owner + part] for part in PARTS if owner + part in named}
        if not parts or (set(parts) == {written.PLAIN} and parts[written.PLAIN].dtype in FLOATS):
            continue
        found[name] = MatrixEntry.of(layout_of(parts, shape, settings))
        for part in found[name].layout.parts:
            del named[owner + part]
    for name in [name for name in named if name.rpartition(".")[2] in ACTIVATIONS]:
        del named[name]
    return found


def layout_of(parts: Mapping[str, Entry], shape: tuple[int, int], settings: Settings) -> Layout:
    """The layout of one matrix. parts: its tensors by the last part of their names."""
    found: Layout | None = (
        integers.IntegerRows.find(parts, shape)
        or floats.Fp8Rows.find(parts, shape, settings.block)
        or floats.Nvfp4Rows.find(parts, shape)
        or columns.Columns.find(
            parts,
            shape,
            settings.bits,
            settings.method == AWQ,
            settings.symmetric,
            settings.zero_offset,
        )
    )
    if found is None:
        first = parts.get(written.PACKED) or parts.get(written.PLAIN) or next(iter(parts.values()))
        raise wrong(
            first,
            f"is {first.dtype} {list(first.shape)}, which is no known format of a quantized {list(shape)}",
        )
    return found
