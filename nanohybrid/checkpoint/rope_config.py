"""Rotary positions in `config.json`, in both spellings.

    before transformers 5   "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, ...}
    transformers 5          "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, ...}

Files of 2023 say `type` instead of `rope_type`. Both spellings are read. The older one is written, because
every program reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanohybrid.checkpoint.config_fields import theta
from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError, shown
from nanohybrid.model.mixers.rope import BY_LENGTH, NEEDED, OPTIONAL, RopeScaling

DEFAULT_THETA = 10_000.0
CONTEXT = "original_max_position_embeddings"


def read_rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and the scaling of the object in a `config.json`, with transformers' defaults.

    Raises ConfigError for a kind of scaling that is not supported, and where the spellings contradict one
    another.
    """
    base, found = raw.get("rope_theta"), dict[str, RopeScaling | None]()
    _refuse_partial("partial_rotary_factor", raw.get("partial_rotary_factor"))
    for key in ("rope_scaling", "rope_parameters"):
        inner = raw.get(key)
        if inner is None or inner == {}:
            continue
        if not isinstance(inner, dict):
            raise ConfigError(f"{key} is {shown(inner)}: it must be an object")
        found[key] = _scaling(key, inner, raw)
        base = base if inner.get("rope_theta") is None else inner["rope_theta"]
    if len(set(found.values())) > 1:
        raise ConfigError("rope_scaling and rope_parameters are given and differ: remove one of them")
    result = theta(DEFAULT_THETA if base is None else base)
    assert result is not None
    return result, next(iter(found.values()), None)


def rope_object(config: HybridConfig) -> dict[str, Any]:
    """The keys of `config.json` that say theta and scaling."""
    scaling = None if config.rope_scaling is None else config.rope_scaling.as_dict()
    return {"rope_scaling": scaling, "rope_theta": config.rope_theta}


def _scaling(key: str, inner: Mapping[str, Any], raw: Mapping[str, Any]) -> RopeScaling | None:
    nested = [name for name, value in inner.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(
            f"{key} has {shown(nested[0])}: rotary positions by kind of layer are not supported"
        )
    _refuse_partial(f"{key}.partial_rotary_factor", inner.get("partial_rotary_factor"))
    if inner.get("mrope_section") is not None:
        raise ConfigError(f"{key}.mrope_section is given: positions in several dimensions are not supported")
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind in (None, "default"):
        return None
    if kind in BY_LENGTH:
        way_out = "; remove it to run the model within its original context" if kind == "dynamic" else ""
        raise ConfigError(
            f"{key}.rope_type is {kind}: its frequencies follow the length of the sequence, which a KV cache "
            f"cannot{way_out}"
        )
    if not isinstance(kind, str) or kind not in NEEDED:
        raise ConfigError(f"{key}.rope_type is {shown(kind)}: known are default, {', '.join(NEEDED)}")
    names = ("factor", *NEEDED[kind], *OPTIONAL.get(kind, ()))
    values = {name: inner[name] for name in names if inner.get(name) is not None}
    if CONTEXT in NEEDED[kind]:  # transformers lets the outer key win, and falls back to the whole context
        context = raw.get(CONTEXT, values.get(CONTEXT, raw.get("max_position_embeddings")))
        values |= {} if context is None else {CONTEXT: context}
    return RopeScaling.of({"rope_type": kind, **values})


def _refuse_partial(name: str, value: Any) -> None:
    if value not in (None, 1):
        raise ConfigError(f"{name} is {shown(value)}: only heads that are rotated whole are supported")
