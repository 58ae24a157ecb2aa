"""The attention mixer: causal grouped-query attention, without position embedding in the Nano 2 family
(paper, section 2.1).

Rotary positions (rope.py) and a norm of queries and keys are options of the configuration, as in Llama and
Qwen3.

T tokens · E hidden size · H query heads · K key/value heads · P head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nanohybrid.errors import ConfigError
from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.mixers.axes import Axes, Outer
from nanohybrid.model.mixers.base import Mixer, Weights
from nanohybrid.model.mixers.checks import check_divides, check_float32
from nanohybrid.model.mixers.declarations import (
    CacheSpec,
    CpuKernel,
    InnerActivation,
    LayerFields,
    MixerSpec,
    PrunableAxis,
    width,
)
from nanohybrid.model.mixers.rope import RopeScaling, inverse_frequencies, rotary_angles, rotate
from nanohybrid.ops.attention import PagedCache, attention
from nanohybrid.ops.attention.torch import QUERY_TILE
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.rms_norm import rms_norm

QUERIES = Outer("num_attention_heads", "head_dim")
KEYS = Outer("num_key_value_heads", "head_dim")


@dataclass(frozen=True, kw_only=True)
class AttentionFields(LayerFields):
    """What attention reads of the configuration."""

    num_attention_heads: int = width(40)
    num_key_value_heads: int = width(8)
    head_dim: int = width(128)
    rope_theta: float | None = None
    """None: no position embedding, as in the whole Nano 2 family."""
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False


class Attention(Mixer[AttentionFields]):
    """Attention over all earlier tokens: a key and a value of [K, P] for each token in the KV cache."""

    symbol = "*"
    label = "attention"
    color = "#d9730d"
    fields = AttentionFields
    block_types = ("attention", "full_attention")
    gguf_names: ClassVar[dict[str, str]] = {
        "q_proj.weight": "attn_q.weight", "k_proj.weight": "attn_k.weight", "v_proj.weight": "attn_v.weight",
        "o_proj.weight": "attn_output.weight", "q_norm.weight": "attn_q_norm.weight",
        "k_norm.weight": "attn_k_norm.weight",
    }  # fmt: skip
    prunable = (
        PrunableAxis(
            "num_attention_heads",
            "--attention-heads",
            "query heads",
            groups="num_key_value_heads",
            fractions=(1.0,),
        ),
    )
    cuda_graphs = True
    activation = InnerActivation("o_proj", "input", ("num_attention_heads", "head_dim"), writer="o_proj")

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: Weights
    k_norm: Weights

    def __init__(self, config: AttentionFields) -> None:
        super().__init__(config)
        self._frequencies: dict[torch.device, Tensor] = {}

    @classmethod
    def declare(cls, config: AttentionFields) -> MixerSpec:
        parameters: dict[str, Axes] = {
            "q_proj.weight": (QUERIES, "hidden_size"),
            "k_proj.weight": (KEYS, "hidden_size"),
            "v_proj.weight": (KEYS, "hidden_size"),
            "o_proj.weight": ("hidden_size", QUERIES),
        }
        if config.qk_norm:
            parameters |= {"q_norm.weight": ("head_dim",), "k_norm.weight": ("head_dim",)}
        row = CacheSpec(("num_key_value_heads", "head_dim"), "paged")
        return MixerSpec(parameters, cache={"key": row, "value": row})

    def forward(self, x_TE: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        q_THP, k_TKP, v_TKP = self.project(x_TE, layout)
        pages = None if cache is None else PagedCache.of(cache)
        return self.o_proj(attention(q_THP, k_TKP, v_TKP, layout, pages).flatten(-2))

    def project(self, x_TE: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, P], keys and values [T, K, P], after QK norm and RoPE if they are configured."""
        config = self.config
        q_THP = self.q_proj(x_TE).unflatten(-1, (config.num_attention_heads, config.head_dim))
        k_TKP = self.k_proj(x_TE).unflatten(-1, (config.num_key_value_heads, config.head_dim))
        v_TKP = self.v_proj(x_TE).unflatten(-1, (config.num_key_value_heads, config.head_dim))
        if config.qk_norm:
            q_THP = rms_norm(q_THP, self.q_norm.weight, config.layer_norm_epsilon)
            k_TKP = rms_norm(k_TKP, self.k_norm.weight, config.layer_norm_epsilon)
        if config.rope_theta is not None:
            scale = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_scale
            positions_T = layout.token_positions(x_TE.device)
            cos_TP, sin_TP = rotary_angles(positions_T, self.frequencies(x_TE.device), scale)
            q_THP, k_TKP = rotate(q_THP, cos_TP, sin_TP), rotate(k_TKP, cos_TP, sin_TP)
        return q_THP, k_TKP, v_TKP

    def frequencies(self, device: torch.device) -> Tensor:
        """Inverse frequencies of the rotary positions [P/2] on a device, computed once."""
        if device not in self._frequencies:
            config = self.config
            once = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
            self._frequencies[device] = once.to(device)
        return self._frequencies[device]

    @classmethod
    def check(cls, config: AttentionFields) -> None:
        check_divides(config, "num_attention_heads", "num_key_value_heads")
        if config.rope_theta is None:
            if config.rope_scaling is not None:
                raise ConfigError("rope_scaling is given and rope_theta is not: without it nothing is scaled")
            return
        check_float32("rope_theta", config.rope_theta, positive=True)
        scaling = config.rope_scaling
        if scaling is not None and scaling.rope_type == "yarn" and config.rope_theta <= 1:
            raise ConfigError(f"rope_theta is {config.rope_theta}: yarn needs more than 1")
        if config.head_dim % 2:
            raise ConfigError(f"head_dim is {config.head_dim}: rotary positions need an even number")

    @classmethod
    def official(cls, config: AttentionFields) -> bool:
        return config.rope_theta is None and not config.qk_norm

    @classmethod
    def gguf_options(cls, config: AttentionFields) -> list[str]:
        rotary = [] if config.rope_theta is None else [f"rotary positions (rope_theta = {config.rope_theta})"]
        return rotary + (["a norm of queries and keys (qk_norm)"] if config.qk_norm else [])

    @classmethod
    def describe(cls, config: AttentionFields) -> str:
        positions = "no positions" if config.rope_theta is None else f"RoPE theta {config.rope_theta:g}"
        if config.rope_scaling is not None:
            positions += f", {config.rope_scaling.rope_type} x {config.rope_scaling.factor:g}"
        heads = (
            f"{config.num_attention_heads} heads, {config.num_key_value_heads} key/value, x {config.head_dim}"
        )
        return f"{heads}, {positions}{', QK norm' if config.qk_norm else ''}"

    @classmethod
    def small(cls, config: AttentionFields) -> dict[str, Any]:
        keys = min(config.num_key_value_heads, 2)
        heads = keys * min(config.num_attention_heads // max(config.num_key_value_heads, 1), 2)
        return dict(num_key_value_heads=keys, num_attention_heads=heads, head_dim=min(config.head_dim, 16))

    @classmethod
    def mixing_flops(cls, config: AttentionFields, tokens: int, position: int) -> int:
        pairs = tokens * position + tokens * tokens // 2
        return 4 * config.num_attention_heads * config.head_dim * pairs

    @classmethod
    def transient_numbers(cls, config: AttentionFields) -> int:
        return 3 * (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim

    @classmethod
    def context_numbers(cls, config: AttentionFields, batch: int) -> int:
        """Keys and values of one sequence in order and once more for each query head, and the mask of a tile
        of queries; or, in a decode step, keys and values of all sequences.
        """
        keys, queries = config.num_key_value_heads, config.num_attention_heads
        return max(
            2 * (keys + queries) * config.head_dim + 2 * QUERY_TILE, 4 * batch * keys * config.head_dim
        )

    @classmethod
    def saved_bytes(cls, config: AttentionFields, narrow: int) -> int:
        """q, k, v and o in fp32, since documents are short; what the norms read, and the rotary angles."""
        queries, keys = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        before = (queries + keys if config.qk_norm else 0) + (
            0 if config.rope_theta is None else 6 * config.head_dim
        )
        return narrow * (config.hidden_size + before + queries) + 4 * (2 * queries + 2 * keys)

    def cpu_kernel(self) -> CpuKernel | None:
        if self.config.head_dim % 16:
            return None
        norms = (self.q_norm.weight, self.k_norm.weight) if self.config.qk_norm else (None, None)
        return CpuKernel("attention", ("q_proj", "k_proj", "v_proj", "o_proj"), ("key", "value"), norms)
