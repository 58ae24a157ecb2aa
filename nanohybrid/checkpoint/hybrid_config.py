"""`config.json` of hybrids: Nemotron-H's, in both of its dialects, and our own beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nanohybrid.checkpoint.config_fields import (
    NEMOTRON,
    OWN,
    build,
    common,
    flag,
    plain,
    refuse,
    theta,
)
from nanohybrid.config import OWN_FIELDS, HybridConfig, used_fields
from nanohybrid.errors import ConfigError, shown
from nanohybrid.model.mixers import MIXERS, kinds, known_kinds

UNLIMITED = ("Infinity", "inf")
"""No upper bound, as programs write it that know no infinity; others write null."""
MOE = "E"
"""The character of a mixture of experts in `hybrid_override_pattern`, which is recognized to be refused by
name.
"""


def block_types() -> dict[str, str]:
    """The names in `layers_block_type`, and the character of the pattern that each stands for."""
    return {name: symbol for symbol, mixer in MIXERS.items() for name in mixer.block_types} | {"moe": MOE}


def parse_hybrid(raw: Mapping[str, Any]) -> HybridConfig:
    """A configuration of model_type nemotron_h or nanohybrid."""
    refuse(raw, use_bias=False, mlp_bias=False, use_conv_bias=True, mlp_hidden_act="relu2")
    if raw.get("mamba_hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"mamba_hidden_act is {shown(raw['mamba_hidden_act'])}: only silu is supported")
    values = common(raw)
    values["pattern"] = pattern = _pattern(raw)
    if values.get("head_dim") is None and raw.get("attention_head_dim") is not None:
        values["head_dim"] = raw["attention_head_dim"]
    if values.get("layer_norm_epsilon") is None and raw.get("rms_norm_eps") is not None:
        values["layer_norm_epsilon"] = raw["rms_norm_eps"]
    limit = plain(values.pop("time_step_limit", None))
    if limit is not None:
        if not isinstance(limit, list | tuple):
            raise ConfigError(f"time_step_limit is {shown(limit)}: it must be two numbers, the smaller first")
        if len(limit) == 2 and (limit[1] is None or limit[1] in UNLIMITED):
            limit = (limit[0], math.inf)
        values["time_step_limit"] = tuple(limit)
    values["tie_word_embeddings"] = flag(raw, "tied_head")  # tie_word_embeddings is dead in this dialect
    if raw["model_type"] == OWN:
        values["rope_theta"] = theta(raw.get("rope_theta"))
        values["rope_scaling"] = raw.get("rope_scaling")
        values["qk_norm"] = flag(raw, "qk_norm")
        values["mlp_activation"] = raw.get("mlp_activation")
        values["extra"] = _extra(raw, pattern)
    return build(values, pattern)


def _extra(raw: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """The fields of kinds of layers that others registered; a tuple is a list in the file."""
    found: dict[str, Any] = {}
    for mixer in kinds(pattern):
        for field in fields(mixer.fields):
            if raw.get(field.name) is not None and field.name not in OWN_FIELDS:
                value = plain(raw[field.name])
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


def hybrid_object(config: HybridConfig, dtype: str, kind: str) -> dict[str, Any]:
    """What is written to `config.json` under model_type nemotron_h or nanohybrid."""
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
        every = config.as_dict()
        result |= {name: every[name] for name in further} | dict(config.extra)
    return result
