"""`config.json` in and out: every dialect in which the family's configurations are written, and Qwen3's.

Read: the official one (`hybrid_override_pattern`, bare `Infinity`), the one that transformers 5 saves
(`layers_block_type`, `{"__float__": "Infinity"}`), `qwen3`, and our own.

Written: `qwen3` for a dense model of that architecture, the official dialect where every kind of layer says
that it describes it (Mixer.official), and else our own: the official keys and all further fields that the
layers read, under another `model_type`, so that a program that does not know these fields refuses the file
instead of computing something else. What is written is read back before it is returned; a field that does not
survive is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nanohybrid.checkpoint.jsonfile import read_object
from nanohybrid.config import OWN_FIELDS, HybridConfig, used_fields
from nanohybrid.errors import CheckpointError, ConfigError, shown
from nanohybrid.model.mixers import MIXERS, MLP, Attention, kinds, known_kinds, widths
from nanohybrid.model.mixers.checks import check_float32

CONFIG = "config.json"
NEMOTRON, QWEN, OWN = "nemotron_h", "qwen3", "nanohybrid"
MOST_LAYERS = 10_000
DENSE = Attention.symbol + MLP.symbol  # one of Qwen3's layers is two of ours
MOE = "E"
"""The character of a mixture of experts in `hybrid_override_pattern`, which is recognized to be refused by
name.
"""


def block_types() -> dict[str, str]:
    """The names in `layers_block_type`, and the character of the pattern that each stands for."""
    return {name: symbol for symbol, mixer in MIXERS.items() for name in mixer.block_types} | {"moe": MOE}


def load_config(directory: str | Path) -> HybridConfig:
    """The configuration of a checkpoint directory. Raises CheckpointError or ConfigError in one line naming
    the file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: {'is not a directory' if directory.exists() else 'no such directory'}; name a "
            f"checkpoint's"
        )
    path = directory / CONFIG
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; a checkpoint is a directory of config.json and *.safetensors"
        )
    raw = read_object(path)
    try:
        return parse(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(raw: Mapping[str, Any]) -> HybridConfig:
    """A configuration from the object in `config.json`. Keys that are not known are normal and ignored."""
    kind = raw.get("model_type")
    if kind == QWEN:
        return _parse_qwen(raw)
    if kind in (NEMOTRON, OWN):
        return _parse_hybrid(raw)
    named = f'model_type is "{shown(kind)}"' if isinstance(kind, str) else "model_type is missing"
    raise ConfigError(f"{named}: known are {NEMOTRON}, {QWEN} and {OWN}")


def model_type(config: HybridConfig) -> str:
    """The `model_type` under which a configuration is written: the first of qwen3, nemotron_h and nanohybrid
    that can say it.
    """
    rotary, normed, gated = config.rope_theta is not None, config.qk_norm, config.mlp_activation == "swiglu"
    if config.pattern == DENSE * (len(config.pattern) // 2) and rotary and normed and gated:
        return QWEN
    return NEMOTRON if all(mixer.official(config) for mixer in kinds(config.pattern)) else OWN


def config_object(config: HybridConfig, dtype: str) -> dict[str, Any]:
    """What is written to `config.json`; dtype is the weights', as "bfloat16".

    Raises CheckpointError where a field that the model uses would not be read back as it is.
    """
    kind = model_type(config)
    result = _qwen_object(config, dtype) if kind == QWEN else _hybrid_object(config, dtype, kind)
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


# ---- Nemotron-H, and our own beside it


def _parse_hybrid(raw: Mapping[str, Any]) -> HybridConfig:
    _refuse(raw, use_bias=False, mlp_bias=False, use_conv_bias=True, mlp_hidden_act="relu2")
    if raw.get("mamba_hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"mamba_hidden_act is {shown(raw['mamba_hidden_act'])}: only silu is supported")
    values = _common(raw)
    values["pattern"] = pattern = _pattern(raw)
    if values.get("head_dim") is None and raw.get("attention_head_dim") is not None:
        values["head_dim"] = raw["attention_head_dim"]
    if values.get("layer_norm_epsilon") is None and raw.get("rms_norm_eps") is not None:
        values["layer_norm_epsilon"] = raw["rms_norm_eps"]
    limit = _plain(values.pop("time_step_limit", None))
    if limit is not None:
        if not isinstance(limit, list | tuple):
            raise ConfigError(f"time_step_limit is {shown(limit)}: it must be two numbers, the smaller first")
        values["time_step_limit"] = tuple(limit)
    values["tie_word_embeddings"] = _flag(raw, "tied_head")  # tie_word_embeddings is dead in this dialect
    if raw["model_type"] == OWN:
        values["rope_theta"] = _theta(raw.get("rope_theta"))
        values["qk_norm"] = _flag(raw, "qk_norm")
        values["mlp_activation"] = raw.get("mlp_activation")
        values["extra"] = _extra(raw, pattern)
    return _build(values, pattern)


def _extra(raw: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """The fields of kinds of layers that others registered; a tuple is a list in the file."""
    found: dict[str, Any] = {}
    for mixer in kinds(pattern):
        for field in fields(mixer.fields):
            if raw.get(field.name) is not None and field.name not in OWN_FIELDS:
                value = _plain(raw[field.name])
                found[field.name] = tuple(value) if isinstance(field.default, tuple) else value
    return found


def _pattern(raw: Mapping[str, Any]) -> str:
    known = block_types()
    written, blocks = raw.get("hybrid_override_pattern"), raw.get("layers_block_type", raw.get("layer_types"))
    if blocks is not None:
        if not isinstance(blocks, list) or not all(isinstance(block, str) for block in blocks):
            raise ConfigError(
                f"layers_block_type is {shown(blocks)}: it must be a list of {', '.join(known)}"
            )
        unknown = [block for block in blocks if block not in known]
        if unknown:
            raise ConfigError(f'layers_block_type has "{shown(unknown[0])}": known are {", ".join(known)}')
        listed = "".join(known[block] for block in blocks)
        if written is not None and written != listed:
            raise ConfigError(
                f"hybrid_override_pattern is {shown(written)} and layers_block_type says {shown(listed)}: "
                f"which is it?"
            )
        written = listed
    if not isinstance(written, str) or not written:
        raise ConfigError("neither hybrid_override_pattern nor layers_block_type names the layers")
    if MOE in written and MOE not in MIXERS:
        raise ConfigError(
            f"layer {written.index(MOE)} is a mixture of experts (E): not supported yet; known are "
            f"{known_kinds()}"
        )
    layers = raw.get("num_hidden_layers")
    if layers is not None and layers != len(written):
        raise ConfigError(
            f"num_hidden_layers is {shown(layers)} and the layer pattern has {len(written)} characters: "
            f"which is it?"
        )
    return written


def _hybrid_object(config: HybridConfig, dtype: str, kind: str) -> dict[str, Any]:
    result: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM" if kind == NEMOTRON else "HybridLM"],
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": config.bos_token_id,
        "chunk_size": config.chunk_size,
        "conv_kernel": config.conv_kernel, "eos_token_id": config.eos_token_id, "expand": 2,
        "head_dim": config.head_dim,
        "hidden_dropout": 0.0, "hidden_size": config.hidden_size, "hybrid_override_pattern": config.pattern,
        "initializer_range": config.initializer_range, "intermediate_size": config.intermediate_size,
        "layer_norm_epsilon": config.layer_norm_epsilon, "mamba_head_dim": config.mamba_head_dim,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": config.mamba_num_heads, "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "max_position_embeddings": config.max_position_embeddings, "mlp_bias": False,
        "mlp_hidden_act": "relu2", "model_type": kind,
        "n_groups": config.n_groups, "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads, "num_logits_to_keep": 1,
        "pad_token_id": config.pad_token_id,
        "rescale_prenorm_residual": config.rescale_prenorm_residual, "residual_in_fp32": False,
        "rms_norm_eps": config.layer_norm_epsilon,
        "sliding_window": None, "ssm_state_size": config.ssm_state_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "time_step_floor": config.time_step_floor, "time_step_limit": list(config.time_step_limit),
        "time_step_max": config.time_step_max, "time_step_min": config.time_step_min, "torch_dtype": dtype,
        "use_bias": False,
        "use_cache": True, "use_conv_bias": True, "vocab_size": config.vocab_size,
    }  # fmt: skip
    if config.tie_word_embeddings:
        result["tied_head"] = True
    if kind == OWN:
        further = sorted(used_fields(config.pattern) - {"pattern"} - set(result))
        result |= {name: getattr(config, name) for name in further} | dict(config.extra)
    return result


# ---- Qwen3


def _parse_qwen(raw: Mapping[str, Any]) -> HybridConfig:
    _refuse(raw, attention_bias=False, hidden_act="silu", use_sliding_window=False)
    if "sliding_attention" in (raw.get("layer_types") or ()):
        raise ConfigError("layer_types has sliding_attention: only full attention is supported")
    layers = raw.get("num_hidden_layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= MOST_LAYERS:
        raise ConfigError(
            f"num_hidden_layers is {shown(layers)}: it must be a whole number from 1 to {MOST_LAYERS}"
        )
    values = _common(raw)
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = raw.get("num_attention_heads")
    values["layer_norm_epsilon"] = raw.get("rms_norm_eps", 1e-6)
    values["rope_theta"] = _rope(raw)
    values["tie_word_embeddings"] = _flag(raw, "tie_word_embeddings")
    values |= {"pattern": DENSE * layers, "qk_norm": True, "mlp_activation": "swiglu"}
    return _build(values, values["pattern"])


def _rope(raw: Mapping[str, Any]) -> float:
    """theta from `rope_theta`, or from `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    theta = raw.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        inner = raw.get(key)
        if inner is None:
            continue
        if not isinstance(inner, dict):
            raise ConfigError(f"{key} is {shown(inner)}: it must be an object")
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind != "default":
            raise ConfigError(
                f"{key}.rope_type is {shown(kind)}: only default is supported, context is not extended by "
                f"scaling"
            )
        theta = inner.get("rope_theta", theta)
    result = _theta(10_000.0 if theta is None else theta)
    assert result is not None
    return result


def _qwen_object(config: HybridConfig, dtype: str) -> dict[str, Any]:
    layers = config.num_hidden_layers // 2
    return {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id, "head_dim": config.head_dim, "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range, "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings, "max_window_layers": layers,
        "model_type": QWEN,
        "num_attention_heads": config.num_attention_heads, "num_hidden_layers": layers,
        "num_key_value_heads": config.num_key_value_heads, "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.layer_norm_epsilon, "rope_scaling": None, "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_word_embeddings, "torch_dtype": dtype, "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
        **({} if config.rescale_prenorm_residual else {"rescale_prenorm_residual": False}),
    }  # fmt: skip


# ---- what both need

_READ_APART = {"pattern", "extra", "rope_theta", "qk_norm", "mlp_activation", "tie_word_embeddings"}


def _common(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are called the same in the file and here."""
    values = {
        field.name: raw.get(field.name) for field in fields(HybridConfig) if field.name not in _READ_APART
    }
    if isinstance(values["eos_token_id"], list) and values["eos_token_id"]:
        values["eos_token_id"] = values["eos_token_id"][0]
    if values["rescale_prenorm_residual"] is not None:
        values["rescale_prenorm_residual"] = _flag(raw, "rescale_prenorm_residual")
    return values


def _build(values: dict[str, Any], pattern: str) -> HybridConfig:
    """A HybridConfig; None means the default, where a width must not be guessed it is an error."""
    present = {name: _plain(value) for name, value in values.items() if value is not None}
    needed = ["vocab_size", "hidden_size", *(name for mixer in kinds(pattern) for name in widths(mixer))]
    for name in needed:  # an unknown character in the pattern is told by HybridConfig
        if name not in present and name not in present.get("extra", {}):
            raise ConfigError(f"{name} is missing")
    present.setdefault("intermediate_size", 1)  # of a pattern without MLPs: not used
    return HybridConfig(**present)


def _refuse(raw: Mapping[str, Any], **only: Any) -> None:
    """Raise where a field asks for something that the model does not do."""
    for name, supported in only.items():
        if raw.get(name, supported) not in (supported, None):
            raise ConfigError(f"{name} is {shown(raw[name])}: only {supported} is supported")


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}: it must be true or false")
    return bool(value)


def _theta(value: Any) -> float | None:
    if value is None:
        return None
    check_float32("rope_theta", value, positive=True)
    return float(value)


def _plain(value: Any) -> Any:
    """Undo `{"__float__": "Infinity"}`, in lists too."""
    if (
        isinstance(value, dict)
        and set(value) == {"__float__"}
        and value["__float__"] in ("Infinity", "-Infinity")
    ):
        return float(value["__float__"].replace("Infinity", "inf"))
    return [_plain(item) for item in value] if isinstance(value, list) else value
