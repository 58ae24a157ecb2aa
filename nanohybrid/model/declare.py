"""What every parameter and state of a whole model is, from the layers' own declarations: no weights needed."""

from __future__ import annotations

from dataclasses import dataclass

from nanohybrid.config import ATTENTION, MAMBA, MLP, HybridConfig
from nanohybrid.model import attention, mamba2, mlp
from nanohybrid.model.axes import Axes, StateSpec, axis_sizes, shape
from nanohybrid.model.module import Mixer

MIXERS: dict[str, type[Mixer]] = {MAMBA: mamba2.Mamba2, ATTENTION: attention.Attention, MLP: mlp.MLP}


@dataclass(frozen=True)
class Declared:
    """One parameter: its axes, its shape, and the layer it belongs to (None: embeddings, final norm, head)."""

    axes: Axes
    shape: tuple[int, ...]
    layer: int | None
    part: str  # "embedding", "head", "norm", or the pattern's character


def parameters(config: HybridConfig) -> dict[str, Declared]:
    """Every parameter by its official checkpoint name, in the order of the forward pass."""
    sizes = axis_sizes(config)
    table: dict[str, Declared] = {}

    def add(name: str, axes: Axes, layer: int | None, part: str) -> None:
        table[name] = Declared(axes, shape(axes, sizes), layer, part)

    add("backbone.embeddings.weight", ("vocab", "embedding"), None, "embedding")
    for index, kind in enumerate(config.pattern):
        add(f"backbone.layers.{index}.norm.weight", ("embedding",), index, kind)
        for name, axes in MIXERS[kind].declare(config).parameters.items():
            add(f"backbone.layers.{index}.mixer.{name}", axes, index, kind)
    add("backbone.norm_f.weight", ("embedding",), None, "norm")
    if not config.tie_word_embeddings:
        add("lm_head.weight", ("vocab", "embedding"), None, "head")
    return table


def states(config: HybridConfig) -> list[dict[str, StateSpec]]:
    """What each layer remembers, by name."""
    return [dict(MIXERS[kind].declare(config).states) for kind in config.pattern]
