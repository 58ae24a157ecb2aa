"""What a model is: one frozen dataclass.

The layer pattern is a string with one character a layer (model/mixers).

Field names are those of the official `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import MISSING, dataclass, field, fields, replace
from math import prod
from typing import Any

from nanohybrid.errors import ConfigError, shown
from nanohybrid.model.mixers import (
    MIXERS,
    AttentionFields,
    Mamba2Fields,
    Mixer,
    MLPFields,
    field_names,
    kinds,
    known_kinds,
)
from nanohybrid.model.mixers.axes import Axes, axis_sizes, ordered_names, shape
from nanohybrid.model.mixers.checks import check_float32, check_int
from nanohybrid.model.mixers.rope import RopeScaling


@dataclass(frozen=True, kw_only=True)
class HybridConfig(MLPFields, Mamba2Fields, AttentionFields):
    """The shape of a hybrid (or, by its pattern, dense or pure Mamba-2) language model.

    Each kind of layer declares the fields that it reads; those of Mamba-2, attention and MLP are fields here,
    those of further registered kinds stand in `extra` and read as attributes (`config.sliding_window`).
    Defaults are the Nemotron Nano 2 family's (paper, section 2.1 and Table 1). Raises ConfigError where
    fields contradict one another; only fields that the pattern uses are checked.
    """

    pattern: str = field(kw_only=False)
    vocab_size: int
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131_072
    rescale_prenorm_residual: bool = True
    bos_token_id: int = 1
    eos_token_id: int = 12
    pad_token_id: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of kinds of layers that others registered, by name. Stored as a sorted tuple of pairs."""

    def __post_init__(self) -> None:
        limit: object = self.time_step_limit
        if isinstance(limit, list):  # from JSON or TOML
            object.__setattr__(self, "time_step_limit", tuple(limit))
        scaling: object = self.rope_scaling
        if isinstance(scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling.of(scaling))
        elif scaling is not None and not isinstance(scaling, RopeScaling):
            raise ConfigError(f"rope_scaling is {shown(scaling)}: it must be an object")
        _check_pattern(self.pattern)
        object.__setattr__(self, "extra", _complete_extra(self.pattern, dict(self.extra)))
        _check_numbers(self)
        _check_sizes(self)
        for mixer in kinds(self.pattern):
            mixer.check(self)

    def __getattr__(self, name: str) -> Any:
        """A field of a further registered kind."""
        if not name.startswith("_"):
            for key, value in self.__dict__.get("extra", ()):
                if key == name:
                    return value
            for mixer in kinds(self.__dict__.get("pattern", "")):  # what a kind derives from its fields
                if (
                    isinstance(derived := getattr(mixer.fields, name, None), property)
                    and derived.fget is not None
                ):
                    return derived.fget(self)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of one mixer each: the length of the pattern."""
        return len(self.pattern)

    @property
    def mixers(self) -> tuple[type[Mixer[Any]], ...]:
        """The kind of each layer."""
        return tuple(MIXERS[symbol] for symbol in self.pattern)

    def replace(self, **changes: Any) -> HybridConfig:
        """This configuration with some fields changed, those in `extra` too; checked anew."""
        own = {one.name for one in fields(self)}
        extra = dict(self.extra) | {name: value for name, value in changes.items() if name not in own}
        if "pattern" in changes:  # fields of a kind that is gone go too
            used = {name for mixer in kinds(changes["pattern"]) for name in field_names(mixer)}
            extra = {name: value for name, value in extra.items() if name in used or name in changes}
        direct = {name: value for name, value in changes.items() if name in own}
        return replace(self, **{"extra": extra, **direct})

    def as_dict(self) -> dict[str, Any]:
        """All fields by name, those of `extra` among them; a scaling of RoPE as in `config.json`."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "extra"}
        own["rope_scaling"] = None if self.rope_scaling is None else self.rope_scaling.as_dict()
        return own | dict(self.extra)


OWN_FIELDS: Set[str] = frozenset(one.name for one in fields(HybridConfig))
"""The fields of HybridConfig itself."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAY_BE_ZERO = ("initializer_range",)
ELEMENTS_LARGEST = 2**40
"""Elements of one tensor; torch's own arithmetic on sizes ends at 2^63 bytes."""
LAYERS_LARGEST = 20_000


def used_fields(pattern: str) -> Set[str]:
    """The configuration fields that decide what a model of this pattern is: those of every model and of the
    kinds in it.
    """
    by_kind = {name for mixer in MIXERS.values() for name in field_names(mixer)}
    return (OWN_FIELDS - by_kind - {"extra"}) | {
        name for mixer in kinds(pattern) for name in field_names(mixer)
    }


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"the layer pattern is {shown(pattern)}: it must be a string of {known_kinds()}")
    if len(pattern) > LAYERS_LARGEST:
        raise ConfigError(
            f"the layer pattern has {len(pattern):,} layers: at most {LAYERS_LARGEST:,} are allowed"
        )
    for position, character in enumerate(pattern):
        if character not in MIXERS:
            raise ConfigError(
                f'the layer pattern has "{character}" at position {position}: known are {known_kinds()}; '
                "a file that registers a further kind is named by NANOHYBRID_MIXERS"
            )


def _complete_extra(pattern: str, given: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The fields of further kinds, with their defaults.

    Raises ConfigError for a field that is unknown or missing.
    """
    complete: dict[str, Any] = {}
    for mixer in kinds(pattern):
        for one in fields(mixer.fields):
            if one.name in OWN_FIELDS:
                _check_shared_field(mixer, one)
                continue
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            if one.name not in given and default is MISSING:
                raise ConfigError(f"{one.name} is missing: layers {mixer.symbol} ({mixer.label}) need it")
            complete[one.name] = given.get(one.name, default)
    unknown = sorted(set(given) - set(complete))
    if unknown:
        raise ConfigError(
            f"{unknown[0]} is no field that a layer of the pattern {pattern[:40]} has: remove it"
        )
    return tuple(sorted(complete.items()))


def _check_shared_field(mixer: type[Mixer[Any]], field_of_kind: Any) -> None:
    """Raise ConfigError where a kind gives a field of HybridConfig another default, which would not be
    used.
    """
    own = next(one for one in fields(HybridConfig) if one.name == field_of_kind.name)
    if field_of_kind.default is not MISSING and field_of_kind.default != own.default:
        raise ConfigError(
            f"{mixer.__name__}.fields gives {own.name} the default {shown(field_of_kind.default)}, and "
            f"its default is "
            f"{shown(own.default)}: inherit the field, or give yours another name"
        )


def _check_numbers(config: HybridConfig) -> None:
    """Raise ConfigError where a field is of the wrong type, or a number that the pattern uses is out of
    range.
    """
    used = used_fields(config.pattern)
    declared = [one for mixer in kinds(config.pattern) for one in fields(mixer.fields)]
    declared += fields(HybridConfig)
    for name, annotation in {one.name: one.type for one in declared}.items():
        value = getattr(config, name)
        if annotation == "int":
            check_int(name, value, least=0 if name in _TOKEN_IDS else 1, ranged=name in used)
        elif annotation == "float":
            check_float32(name, value, positive=name not in _MAY_BE_ZERO)
        elif annotation == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{name} is {shown(value)}: it must be true or false")


def _check_sizes(config: HybridConfig) -> None:
    """Raise ConfigError where a parameter, or a cache tensor of one sequence, has more than ELEMENTS_LARGEST
    elements.
    """
    sizes = axis_sizes(config)
    tensors: list[Axes] = [("vocab_size", "hidden_size")]
    for mixer in kinds(config.pattern):
        spec = mixer.declare(config)
        tensors += [*spec.parameters.values(), *(one.axes for one in spec.cache.values())]
    for axes in tensors:
        dimensions = shape(axes, sizes)
        if prod(dimensions) > ELEMENTS_LARGEST:
            fields_of = dict.fromkeys(name for axis in axes for name in ordered_names(axis))
            said = ", ".join(f"{name} {sizes[name]:,}" for name in fields_of)
            raise ConfigError(
                f"{said} make a tensor of {' x '.join(f'{n:,}' for n in dimensions)}: "
                f"at most {ELEMENTS_LARGEST:,} elements"
            )
