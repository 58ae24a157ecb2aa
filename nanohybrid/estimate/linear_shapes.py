"""The matrices of a model's layers as rows and columns: what is multiplied, read and quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanohybrid.config import HybridConfig
from nanohybrid.model.mixers import Mixer
from nanohybrid.model.mixers.axes import axis_sizes, shape

Matrix = tuple[int, int]  # outputs, inputs


def matrices_of(mixer: type[Mixer[Any]], config: HybridConfig) -> list[Matrix]:
    """The shapes of the linears of one kind of layer."""
    shapes = (shape(axes, axis_sizes(config)) for axes in mixer.declare(config).parameters.values())
    return [(dimensions[0], dimensions[1]) for dimensions in shapes if len(dimensions) == 2]


def every_matrix(config: HybridConfig) -> Iterator[tuple[Matrix, int]]:
    """Each shape, and how many layers have it."""
    for mixer in dict.fromkeys(config.mixers):
        for matrix in matrices_of(mixer, config):
            yield matrix, config.mixers.count(mixer)
