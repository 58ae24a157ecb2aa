"""`config.json` of dense models: Llama (SmolLM2 too), Mistral without a sliding window, and Qwen3.

One of their layers is two of ours, attention and then the MLP. Qwen3 alone has a norm of queries and keys.
Llama and Mistral compute the same. Both are written as `llama`, except where the hidden size is no multiple
of the number of heads: transformers refuses that for Llama and not for Mistral.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanohybrid.checkpoint.config_fields import LLAMA, MISTRAL, QWEN, build, common, flag, refuse
from nanohybrid.checkpoint.rope_config import read_rope, rope_object
from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError, shown
from nanohybrid.model.mixers import MLP, Attention

MOST_LAYERS = 10_000
BLOCK = Attention.symbol + MLP.symbol
ARCHITECTURES = {LLAMA: "LlamaForCausalLM", MISTRAL: "MistralForCausalLM", QWEN: "Qwen3ForCausalLM"}
CONTEXTS = {LLAMA: 2_048, MISTRAL: 131_072, QWEN: 32_768}
"""transformers' `max_position_embeddings` where the file has none."""
MISTRALS_WINDOW = 4_096
"""transformers' `sliding_window` where a Mistral's file has none."""
BOS, EOS = 1, 2
"""transformers' ids for Llama and Mistral where the file has none."""


def dense_type(config: HybridConfig) -> str | None:
    """The `model_type` of a dense configuration; None where none of them describes it."""
    whole_blocks = config.pattern == BLOCK * (len(config.pattern) // 2)
    if not whole_blocks or config.rope_theta is None or config.mlp_activation != "swiglu":
        return None
    if config.qk_norm:
        return QWEN
    return MISTRAL if config.hidden_size % config.num_attention_heads else LLAMA


def parse_dense(raw: Mapping[str, Any]) -> HybridConfig:
    """A configuration of model_type llama, mistral or qwen3."""
    kind = raw["model_type"]
    refuse(raw, attention_bias=False, mlp_bias=False)
    if raw.get("hidden_act") not in ("silu", "swish", None):
        raise ConfigError(f"hidden_act is {shown(raw['hidden_act'])}: only silu is supported")
    _refuse_windows(raw, kind)
    layers = raw.get("num_hidden_layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= MOST_LAYERS:
        raise ConfigError(
            f"num_hidden_layers is {shown(layers)}: it must be a whole number from 1 to {MOST_LAYERS}"
        )
    values = common(raw)
    if values.get("num_key_value_heads") is None and (kind != MISTRAL or "num_key_value_heads" in raw):
        values["num_key_value_heads"] = raw.get("num_attention_heads")
    if kind != QWEN:
        _complete(values, raw)
    if values.get("max_position_embeddings") is None:
        values["max_position_embeddings"] = CONTEXTS[kind]
    values["layer_norm_epsilon"] = raw.get("rms_norm_eps", 1e-6)
    values["rope_theta"], values["rope_scaling"] = read_rope(raw)
    values["tie_word_embeddings"] = flag(raw, "tie_word_embeddings")
    values |= {"pattern": BLOCK * layers, "qk_norm": kind == QWEN, "mlp_activation": "swiglu"}
    return build(values, values["pattern"])


def _refuse_windows(raw: Mapping[str, Any], kind: str) -> None:
    """Raise ConfigError where a layer does not attend to all earlier tokens."""
    if kind == QWEN:
        refuse(raw, use_sliding_window=False)
    kinds = raw.get("layer_types") or []
    other = [layer for layer in kinds if layer != "full_attention"] if isinstance(kinds, list) else [kinds]
    if other:
        raise ConfigError(f"layer_types has {shown(other[0])}: only full_attention is supported")
    window = raw.get("sliding_window", MISTRALS_WINDOW)
    context = raw.get("max_position_embeddings", CONTEXTS[MISTRAL])
    whole = isinstance(window, int) and isinstance(context, int) and window >= context
    if kind == MISTRAL and window is not None and not whole:
        missing = "" if "sliding_window" in raw else " (the default)"
        raise ConfigError(
            f"sliding_window is {shown(window)}{missing}: only full attention is supported. Up to the window "
            f'both are the same: set "sliding_window" to null and "max_position_embeddings" to '
            f"{shown(window)}"
        )


def _complete(values: dict[str, Any], raw: Mapping[str, Any]) -> None:
    """Fill in what files of Llama and Mistral leave out, as transformers does."""
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    numbers = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (hidden, heads))
    if values.get("head_dim") is None and numbers:
        assert isinstance(hidden, int) and isinstance(heads, int)
        if hidden % heads:
            raise ConfigError(
                f"head_dim is missing, and hidden_size {hidden} is no multiple of {heads} heads"
            )
        values["head_dim"] = hidden // heads
    for name, default in (("bos_token_id", BOS), ("eos_token_id", EOS)):
        values[name] = default if values.get(name) is None else values[name]


def dense_object(config: HybridConfig, dtype: str, kind: str) -> dict[str, Any]:
    """What is written to `config.json` under model_type llama, mistral or qwen3."""
    layers = config.num_hidden_layers // 2
    windows: dict[str, dict[str, Any]] = {
        LLAMA: {"mlp_bias": False},
        MISTRAL: {"sliding_window": None},
        QWEN: {"max_window_layers": layers, "sliding_window": None, "use_sliding_window": False},
    }
    return {
        "architectures": [ARCHITECTURES[kind]], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id, "head_dim": config.head_dim, "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range, "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings, "model_type": kind,
        "num_attention_heads": config.num_attention_heads, "num_hidden_layers": layers,
        "num_key_value_heads": config.num_key_value_heads, "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.layer_norm_epsilon, **rope_object(config),
        "tie_word_embeddings": config.tie_word_embeddings, "torch_dtype": dtype, "use_cache": True,
        "vocab_size": config.vocab_size, **windows[kind],
        **({} if config.rescale_prenorm_residual else {"rescale_prenorm_residual": False}),
    }  # fmt: skip
