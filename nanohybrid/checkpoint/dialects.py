"""`config.json` in and out: every dialect that is read, and the one in which a configuration is written.

Read: hybrids in the official dialect (`hybrid_override_pattern`, bare `Infinity`) and in that of
transformers 5 (`layers_block_type`, `{"__float__": "Infinity"}`); `llama`, `mistral` and `qwen3`; our own.

Written: `llama`, `mistral` or `qwen3` for a dense model of that architecture, the official dialect where
every kind of layer says that it describes it (Mixer.official), and else our own: the official keys and all
further fields that the layers read, under another `model_type`, so that a program that does not know these
fields refuses the file instead of computing something else. What is written is read back before it is
returned; a field that does not survive is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nanohybrid.checkpoint.config_fields import DENSE_TYPES, NEMOTRON, OWN, whole_numbers
from nanohybrid.checkpoint.dense_config import dense_object, dense_type, parse_dense
from nanohybrid.checkpoint.hybrid_config import hybrid_object, parse_hybrid
from nanohybrid.checkpoint.jsonfile import LARGEST, parse_object, read_object
from nanohybrid.checkpoint.source import resolve
from nanohybrid.config import OWN_FIELDS, HybridConfig, used_fields
from nanohybrid.errors import CheckpointError, ConfigError, shown
from nanohybrid.gguf import is_gguf
from nanohybrid.gguf.texts import read_text
from nanohybrid.model.mixers import kinds

CONFIG = "config.json"


def load_config(directory: str | Path) -> HybridConfig:
    """The configuration of a checkpoint directory, a GGUF file or an id of the Hub.

    Raises CheckpointError or ConfigError in one line naming the file.
    """
    directory = resolve(directory, weights=False)
    if is_gguf(directory):
        return _parsed(parse_object(read_text(directory / CONFIG, LARGEST), str(directory)), directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: {'is not a directory' if directory.exists() else 'no such directory'}; name a "
            f"checkpoint's"
        )
    path = directory / CONFIG
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; a checkpoint is a directory of config.json and *.safetensors, or a .gguf "
            "file"
        )
    return _parsed(read_object(path), path)


def _parsed(raw: Mapping[str, Any], path: Path) -> HybridConfig:
    try:
        return parse(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(raw: Mapping[str, Any]) -> HybridConfig:
    """A configuration from the object in `config.json`. Keys that are not known are normal and ignored."""
    raw, kind = whole_numbers(raw), raw.get("model_type")
    if kind in DENSE_TYPES:
        return parse_dense(raw)
    if kind in (NEMOTRON, OWN):
        return parse_hybrid(raw)
    named = f'model_type is "{shown(kind)}"' if isinstance(kind, str) else "model_type is missing"
    raise ConfigError(f"{named}: known are {', '.join(DENSE_TYPES)}, {NEMOTRON} and {OWN}")


def model_type(config: HybridConfig) -> str:
    """The `model_type` under which a configuration is written: the first of llama, mistral, qwen3,
    nemotron_h and nanohybrid that can say it.
    """
    dense = dense_type(config)
    if dense is not None:
        return dense
    return NEMOTRON if all(mixer.official(config) for mixer in kinds(config.pattern)) else OWN


def config_object(config: HybridConfig, dtype: str) -> dict[str, Any]:
    """What is written to `config.json`; dtype is the weights', as "bfloat16".

    Raises CheckpointError where a field that the model uses would not be read back as it is.
    """
    kind = model_type(config)
    result = (dense_object if kind in DENSE_TYPES else hybrid_object)(config, dtype, kind)
    again = parse(result)
    used = used_fields(config.pattern) | {field.name for field in fields(config)} - OWN_FIELDS
    missing = object()
    lost = [name for name in sorted(used) if getattr(again, name, missing) != getattr(config, name)]
    if lost:
        raise CheckpointError(
            f"config.json with model_type {kind} cannot hold {lost[0]} = {shown(getattr(config, lost[0]))}: "
            "declare it in the `fields` of the mixer that reads it"
        )
    return result
