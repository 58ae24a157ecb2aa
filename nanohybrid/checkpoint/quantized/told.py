"""What becomes of the quantized matrices of a checkpoint while it is loaded, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from nanohybrid.checkpoint.quantized.matrix import Layout


def told_of_matrices(matrices: Mapping[str, Layout], quantized: Mapping[str, str], dtype: torch.dtype) -> str:
    """One line on the matrices that do not stay what they are in the files; empty where all do.

    quantized: the format of each matrix that is quantized while it is read. dtype: of those that become
    numbers.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for name, layout in matrices.items():
        if name in quantized:
            became = f"quantized again, to {quantized[name]}"
        elif layout.format is None:
            became = f"dequantized to {str(dtype).removeprefix('torch.')}"
        elif layout.label != layout.format:
            became = f"read as {layout.format} with the same codes"
        else:
            continue
        counts[layout.label, became] += 1
    return "; ".join(f"{label} ({count}) {became}" for (label, became), count in counts.items())
