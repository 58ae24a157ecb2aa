"""Fields of `config.json` that all dialects share, and how each value is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError, shown
from nanohybrid.model.mixers import kinds, widths
from nanohybrid.model.mixers.checks import check_float32

NEMOTRON, QWEN, LLAMA, MISTRAL, OWN = "nemotron_h", "qwen3", "llama", "mistral", "nanohybrid"
DENSE_TYPES = (LLAMA, MISTRAL, QWEN)
"""Each `model_type` of a dense model; one of its layers is two of ours, attention and MLP."""
NO_TOKEN = -1
"""Llama 2's files say so that they have no padding token."""
_WHOLE_NUMBERS = {field.name for field in fields(HybridConfig) if field.type == "int"} | {
    "num_hidden_layers", "attention_head_dim",
}  # fmt: skip
_READ_APART = {
    "pattern", "extra", "rope_theta", "rope_scaling", "qk_norm", "mlp_activation", "tie_word_embeddings",
}  # fmt: skip


def whole_numbers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The object with 128.0 read as 128 where a field is a whole number: some programs write no other."""
    return {
        name: int(value)
        if name in _WHOLE_NUMBERS and isinstance(value, float) and value.is_integer()
        else value
        for name, value in raw.items()
    }


def common(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are called the same in the file and here."""
    values = {
        field.name: raw.get(field.name) for field in fields(HybridConfig) if field.name not in _READ_APART
    }
    if isinstance(values["eos_token_id"], list) and values["eos_token_id"]:
        values["eos_token_id"] = values["eos_token_id"][0]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if values[name] == NO_TOKEN:
            values[name] = None
    if values["rescale_prenorm_residual"] is not None:
        values["rescale_prenorm_residual"] = flag(raw, "rescale_prenorm_residual")
    return values


def build(values: dict[str, Any], pattern: str) -> HybridConfig:
    """A HybridConfig; None means the default, where a width must not be guessed it is an error."""
    present = {name: plain(value) for name, value in values.items() if value is not None}
    needed = ["vocab_size", "hidden_size", *(name for mixer in kinds(pattern) for name in widths(mixer))]
    for name in needed:  # an unknown character in the pattern is told by HybridConfig
        if name not in present and name not in present.get("extra", {}):
            raise ConfigError(f"{name} is missing")
    present.setdefault("intermediate_size", 1)  # of a pattern without MLPs: not used
    return HybridConfig(**present)


def refuse(raw: Mapping[str, Any], **only: Any) -> None:
    """Raise where a field asks for something that the model does not do."""
    for name, supported in only.items():
        if raw.get(name, supported) not in (supported, None):
            raise ConfigError(f"{name} is {shown(raw[name])}: only {supported} is supported")


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false, and false where it is missing or null."""
    value = raw.get(name, False)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}: it must be true or false")
    return bool(value)


def theta(value: Any) -> float | None:
    """The base of rotary positions; None where there are none."""
    if value is None:
        return None
    check_float32("rope_theta", value, positive=True)
    return float(value)


def plain(value: Any) -> Any:
    """Undo `{"__float__": "Infinity"}`, in lists too."""
    if (
        isinstance(value, dict)
        and set(value) == {"__float__"}
        and value["__float__"] in ("Infinity", "-Infinity")
    ):
        return float(value["__float__"].replace("Infinity", "inf"))
    return [plain(item) for item in value] if isinstance(value, list) else value
