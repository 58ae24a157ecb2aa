"""Shapes of the weight matrices of a model's layers, for counts of FLOPs, bytes and quantized bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanohybrid.config import HybridConfig
from nanohybrid.model.mixers import Mixer
from nanohybrid.model.mixers.axes import axis_sizes, is_linear, shape

Matrix = tuple[int, int]  # outputs, inputs


def matrices_of(mixer: type[Mixer[Any]], config: HybridConfig) -> list[Matrix]:
    """The shapes of the linears of one kind of layer."""
    sizes, parameters = axis_sizes(config), mixer.declare(config).parameters.items()
    shapes = (shape(axes, sizes) for name, axes in parameters if is_linear(name, axes))
    return [(rows, columns) for rows, columns in shapes]


def every_matrix(config: HybridConfig) -> Iterator[tuple[Matrix, int]]:
    """Each matrix shape with the number of layers that have it."""
    for mixer in dict.fromkeys(config.mixers):
        for matrix in matrices_of(mixer, config):
            yield matrix, config.mixers.count(mixer)
