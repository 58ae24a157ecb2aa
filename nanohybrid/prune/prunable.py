"""Which axes of a model pruning may shorten, from what its mixers declare.

The hidden size belongs to the whole model. Every other axis belongs to layers: each kind names its own
(`Mixer.prunable`), and two kinds may share one, as all kinds of attention share `num_attention_heads`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import lcm

from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.model.mixers import MIXERS, PrunableAxis
from nanohybrid.model.mixers.axes import names

HIDDEN = "hidden_size"
HIDDEN_FRACTIONS = (1.0, 0.9375, 0.875, 0.8125, 0.75)
HIDDEN_AXIS = PrunableAxis(
    HIDDEN, "--hidden-size", "embedding channels", shared=True, multiple=True, fractions=HIDDEN_FRACTIONS
)


def layer_axes(kind: str) -> tuple[PrunableAxis, ...]:
    """The prunable axes of one kind of layer, in the order of the columns of its activation: the axes of its
    scores.

    Raises ConfigError where the activation does not have one of them.
    """
    mixer = MIXERS[kind]
    by_name = {one.axis: one for one in mixer.prunable}
    observed = () if mixer.activation is None else mixer.activation.axes
    if missing := sorted(set(by_name) - set(observed)):
        raise ConfigError(
            f"{mixer.__name__}: its activation has the axes {list(observed)}, so {missing[0]} cannot "
            "be scored"
        )
    return tuple(by_name[axis] for axis in observed if axis in by_name)


def prunable_axes(pattern: Iterable[str]) -> dict[str, PrunableAxis]:
    """Every prunable axis of a pattern by name: the hidden size, then those of each kind, kinds in the order
    of their labels.

    Raises ConfigError where two kinds declare one axis and only one of them shares its selection between
    layers.
    """
    found = {HIDDEN: HIDDEN_AXIS}
    for kind in sorted(set(pattern), key=lambda symbol: MIXERS[symbol].label):
        for one in layer_axes(kind):
            if found.setdefault(one.axis, one).shared != one.shared:
                raise ConfigError(
                    f"{MIXERS[kind].__name__}: {one.axis} is shared={one.shared}, in another kind it is not"
                )
    return found


def known_axes() -> dict[str, PrunableAxis]:
    """The prunable axes of all registered kinds: what the flags of `nanohybrid prune` name."""
    return prunable_axes(MIXERS)


def own_axis(pattern: str, layer: int, axis: str) -> PrunableAxis | None:
    """What the kind of a layer declares of an axis; None where it does not prune it."""
    return next((one for one in layer_axes(pattern[layer]) if one.axis == axis), None)


def layers_with(pattern: str, axis: str, layers: Iterable[int] | None = None) -> list[int]:
    """The layers, of all or of some, that prune an axis."""
    places = range(len(pattern)) if layers is None else layers
    return [layer for layer in places if own_axis(pattern, layer, axis) is not None]


def group_count(config: HybridConfig, axis: PrunableAxis) -> int:
    """How many equal groups the entries of an axis form."""
    return 1 if axis.groups is None else int(getattr(config, axis.groups))


def unit_of(config: HybridConfig, axis: str) -> tuple[int, str]:
    """The number that a size of an axis must be a multiple of, and the field that says so (empty: any size is
    possible)."""
    found = [own_axis(config.pattern, layer, axis) for layer in layers_with(config.pattern, axis)]
    fields = dict.fromkeys(one.groups for one in found if one is not None and one.groups is not None)
    return lcm(*(int(getattr(config, field)) for field in fields)), " and ".join(fields)


def followers(config: HybridConfig, axis: str) -> Iterator[str]:
    """The kinds of a model whose tensors have an axis that they do not prune: they could not follow where it
    is shortened."""
    for kind in dict.fromkeys(config.pattern):
        spec = MIXERS[kind].declare(config)
        tensors = [*spec.parameters.values(), *(one.axes for one in spec.cache.values())]
        used = {name for axes in tensors for part in axes for name in names(part)}
        if axis in used and all(one.axis != axis for one in MIXERS[kind].prunable):
            yield kind
