"""The matrices of a model's layers as rows and columns, from what the layers declare: what is multiplied, read and quantized."""

from __future__ import annotations

from collections.abc import Iterator

from nanohybrid.config import HybridConfig
from nanohybrid.model.mixers.axes import axis_sizes, shape
from nanohybrid.model.spec import MIXERS

Matrix = tuple[int, int]  # outputs, inputs


def matrices_of(config: HybridConfig) -> dict[str, list[Matrix]]:
    """For each kind of layer in the pattern, the shapes of its linears."""
    sizes = axis_sizes(config)
    found: dict[str, list[Matrix]] = {}
    for kind in sorted(set(config.pattern)):
        shapes = (shape(axes, sizes) for axes in MIXERS[kind].declare(config).parameters.values())
        found[kind] = [(dimensions[0], dimensions[1]) for dimensions in shapes if len(dimensions) == 2]
    return found


def every_matrix(config: HybridConfig) -> Iterator[tuple[Matrix, int]]:
    """Each shape, and how many layers have it."""
    for kind, shapes in matrices_of(config).items():
        for matrix in shapes:
            yield matrix, config.pattern.count(kind)
