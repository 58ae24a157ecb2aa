"""What goes as one when a model is pruned in depth: a layer, or a whole block of attention and MLP.

The types llama, mistral and qwen3 have whole blocks only. A model that loses half a block becomes a type of
our own, which no other program reads. So these lose whole blocks, unless single layers are asked for.
"""

from __future__ import annotations

from typing import NamedTuple

from nanohybrid.checkpoint.config_fields import DENSE_TYPES
from nanohybrid.checkpoint.dialects import model_type
from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.estimate import Footprint

AUTO, BLOCK, LAYER = "auto", "block", "layer"
DEPTH_UNITS = (AUTO, BLOCK, LAYER)
BLOCK_LAYERS = 2  # attention and MLP


class DepthUnits(NamedTuple):
    """The units of a model, in order. layers: of each, its layers. parameters: of each, together."""

    layers: tuple[tuple[int, ...], ...]
    parameters: tuple[int, ...]

    @property
    def size(self) -> int:
        """Layers of a unit."""
        return len(self.layers[0])


def depth_units(config: HybridConfig, unit: str = AUTO) -> DepthUnits:
    """The units in which a model loses layers. unit: auto (blocks where the model's type knows only blocks),
    block, or layer.

    Raises ConfigError for another one, and for blocks of a model that has none.
    """
    if unit not in DEPTH_UNITS:
        raise ConfigError(f"depth_unit is {unit!r}: known are {', '.join(DEPTH_UNITS)}")
    has_blocks = model_type(config) in DENSE_TYPES
    if unit == BLOCK and not has_blocks:
        raise ConfigError("depth_unit is block: only llama, mistral and qwen3 models have blocks")
    size = BLOCK_LAYERS if has_blocks and unit != LAYER else 1
    layers = tuple(tuple(range(begin, begin + size)) for begin in range(0, config.num_hidden_layers, size))
    whole, added = Footprint.of(config).parameters, {}
    for one in layers:
        kinds = "".join(config.pattern[layer] for layer in one)
        if kinds not in added:
            longer = config.replace(pattern=config.pattern + kinds)
            added[kinds] = Footprint.of(longer).parameters - whole
    return DepthUnits(layers, tuple(added["".join(config.pattern[i] for i in one)] for one in layers))
