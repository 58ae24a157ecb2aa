"""llama.cpp's architectures, keys and tensor names for our models. This module needs neither torch nor the
gguf library.

Hybrids are `nemotron_h`, dense models `llama` (Mistral's too), or `qwen3` with a norm of queries and keys.
Two lists with one number per layer tell llama.cpp the kinds of a hybrid's layers: MLP width and number of
key/value heads. Where both are 0, the layer is Mamba-2. In a head of a Llama, llama.cpp rotates neighbors, so
the rows of q_proj and k_proj are stored in pairs: of a head's D rows 0, D/2, 1, D/2 + 1, ...

    ours                                    nemotron_h                 stored as
    backbone.layers.7.mixer.A_log           blk.7.ssm_a                -exp(A_log), [H, 1]
    backbone.layers.7.mixer.D               blk.7.ssm_d                [H, 1]
    backbone.layers.7.mixer.dt_bias         blk.7.ssm_dt.bias          [H]
    backbone.layers.7.mixer.conv1d.weight   blk.7.ssm_conv1d.weight    [channels, window], without the axis of
                                            size 1
    backbone.layers.7.mixer.norm.weight     blk.7.ssm_norm.weight      [groups, channels of a group]

Names and shapes: llama.cpp's src/llama-arch.cpp and src/models/{nemotron-h,llama,qwen3}.cpp (November 2026).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nanohybrid.checkpoint.config_fields import DENSE_TYPES, LLAMA, MISTRAL, NEMOTRON, QWEN
from nanohybrid.checkpoint.dialects import model_type
from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.model.mixers import MIXERS, MLP, Attention, Mamba2, kinds
from nanohybrid.model.spec import param_specs

Value = int | float | list[int]
Role = Literal["matrix", "embedding", "vector", "decay"]

WHOLE = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Target:
    """One tensor of the file: its name, its shape, and its role.

    matrix     multiplies activations; may be quantized
    embedding  is looked up by rows; may be quantized
    vector     a norm, a bias or a conv window; always fp32
    decay      a vector that is stored as -exp(vector)
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    head_rows: int = 0
    """Rows of a head where they are stored in pairs, else 0."""


def architecture(config: HybridConfig) -> str:
    """llama.cpp's architecture of a configuration.

    Raises InputError, naming the option, where it has none.
    """
    kind = model_type(config)
    if kind in DENSE_TYPES:
        return LLAMA if kind == MISTRAL else kind
    if kind == NEMOTRON:
        _check_hybrid(config)
        return kind
    unknown = [
        f"{mixer.label} layers ({mixer.symbol})" for mixer in kinds(config.pattern) if not mixer.gguf_names
    ]
    options = unknown or [option for mixer in kinds(config.pattern) for option in mixer.gguf_options(config)]
    raise InputError(
        f"llama.cpp has no architecture for the pattern {config.pattern[:40]} with {' and '.join(options)}: "
        "it knows hybrids without these, and *-*-... with rotary positions and a gated MLP"
    )


def _check_hybrid(config: HybridConfig) -> None:
    lacking = next((one.label for one in (Mamba2, Attention) if one.symbol not in config.pattern), None)
    if lacking is not None:
        raise InputError(
            f"the pattern {config.pattern[:40]} has no {lacking} layer; llama.cpp's {NEMOTRON} aborts "
            "without Mamba-2 or attention layers"
        )
    if config.time_step_limit[0] > 0 or config.time_step_limit[1] < math.inf:
        raise InputError(
            f"time_step_limit is {list(config.time_step_limit)}; llama.cpp does not limit time steps"
        )
    if config.conv_kernel < 2:
        raise InputError("conv_kernel is 1; llama.cpp needs at least 2")


def sizes(config: HybridConfig) -> dict[str, Value]:
    """The keys of the file with the sizes of the model, without the prefix of the architecture."""
    kind = architecture(config)
    common: dict[str, Value] = {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "attention.head_count": config.num_attention_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
    }  # fmt: skip
    if kind in (LLAMA, QWEN):
        assert config.rope_theta is not None
        rotated = {"rope.dimension_count": config.head_dim} if kind == LLAMA else {}
        return common | {
            "block_count": config.num_hidden_layers // 2, "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "rope.freq_base": float(config.rope_theta), **rotated,
        }  # fmt: skip
    return common | {
        "block_count": config.num_hidden_layers, "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "feed_forward_length": [
            config.intermediate_size if layer == MLP.symbol else 0 for layer in config.pattern
        ],
        "attention.head_count_kv": [
            config.num_key_value_heads if layer == Attention.symbol else 0 for layer in config.pattern
        ],
        "ssm.conv_kernel": config.conv_kernel, "ssm.state_size": config.ssm_state_size,
        "ssm.group_count": config.n_groups, "ssm.inner_size": config.mamba_inner_size,
        "ssm.time_step_rank": config.mamba_num_heads,
    }  # fmt: skip


def targets(config: HybridConfig, kind: str | None = None) -> dict[str, Target]:
    """The model's name of each tensor -> its target, in the order of the forward pass.

    A tied head is stored once. kind: llama.cpp's architecture; None takes that of the configuration.
    """
    kind = kind or architecture(config)
    return {
        name: _target(name, declared.shape, declared.part, kind, config)
        for name, declared in param_specs(config).items()
    }


def _target(name: str, shape: tuple[int, ...], part: str, kind: str, config: HybridConfig) -> Target:
    if name in WHOLE:
        role: Role = "embedding" if part == "embedding" else "matrix" if part == "head" else "vector"
        return Target(WHOLE[name], shape, role)
    _, _, index, *rest = name.split(".")
    block, leaf = int(index), ".".join(rest).removeprefix("mixer.")
    if ".".join(rest) == "norm.weight":
        after_attention = kind in DENSE_TYPES and part == MLP.symbol
        return Target(
            f"blk.{_block(block, kind)}.{'ffn_norm' if after_attention else 'attn_norm'}.weight",
            shape,
            "vector",
        )
    place = f"blk.{_block(block, kind)}.{MIXERS[part].gguf_names[leaf]}"
    if leaf in ("A_log", "D"):
        return Target(place, (*shape, 1), "decay" if leaf == "A_log" else "vector")
    if leaf == "norm.weight":
        return Target(place, (config.n_groups, config.mamba_inner_size // config.n_groups), "vector")
    if leaf == "conv1d.weight":
        return Target(place, (shape[0], shape[2]), "vector")
    paired = config.head_dim if kind == LLAMA and leaf in ("q_proj.weight", "k_proj.weight") else 0
    return Target(place, shape, "matrix" if len(shape) == 2 else "vector", paired)


def _block(layer: int, kind: str) -> int:
    """The block of a layer; a block of Llama and Qwen3 is two of our layers."""
    return layer // 2 if kind in DENSE_TYPES else layer
