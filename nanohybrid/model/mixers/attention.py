"""The attention mixer: causal grouped-query attention, without positions in the Nano 2 family.

Rotary positions and a norm of queries and keys are options of the configuration, which make it Qwen3's.

T tokens · E embedding · H query heads · K key/value heads · P head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanohybrid.config import HybridConfig
from nanohybrid.model.mixers.axes import Axes, Declaration, Outer, StateSpec
from nanohybrid.model.mixers.base import Mixer, Weights
from nanohybrid.ops.attention import Cache, attention
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.rms_norm import rms_norm

QUERIES = Outer("attention_heads", "attention_channels")
KEYS = Outer("kv_heads", "attention_channels")


class Attention(Mixer):
    """The mixer that remembers every token: a key and a value of [K, P] each."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: Weights
    k_norm: Weights

    @staticmethod
    def declare(config: HybridConfig) -> Declaration:
        parameters: dict[str, Axes] = {
            "q_proj.weight": (QUERIES, "embedding"),
            "k_proj.weight": (KEYS, "embedding"),
            "v_proj.weight": (KEYS, "embedding"),
            "o_proj.weight": ("embedding", QUERIES),
        }
        if config.qk_norm:
            parameters |= {"q_norm.weight": ("attention_channels",), "k_norm.weight": ("attention_channels",)}
        row = StateSpec(("kv_heads", "attention_channels"), per_token=True, dtype=None)
        return Declaration(parameters, states={"key": row, "value": row})

    def forward(self, x_TE: Tensor, layout: Layout, state: dict[str, Tensor] | None) -> Tensor:
        config = self.config
        q_THP = self.q_proj(x_TE).unflatten(-1, (config.num_attention_heads, config.head_dim))
        k_TKP = self.k_proj(x_TE).unflatten(-1, (config.num_key_value_heads, config.head_dim))
        v_TKP = self.v_proj(x_TE).unflatten(-1, (config.num_key_value_heads, config.head_dim))
        if config.qk_norm:
            q_THP = rms_norm(q_THP, self.q_norm.weight, config.layer_norm_epsilon)
            k_TKP = rms_norm(k_TKP, self.k_norm.weight, config.layer_norm_epsilon)
        if config.rope_theta is not None:
            cos_TP, sin_TP = rotary_angles(
                layout.token_positions(x_TE.device), config.head_dim, config.rope_theta
            )
            q_THP, k_TKP = rotate(q_THP, cos_TP, sin_TP), rotate(k_TKP, cos_TP, sin_TP)
        cache = (
            None
            if state is None
            else Cache(state["key"], state["value"], state.get("key_scale"), state.get("value_scale"))
        )
        return self.o_proj(attention(q_THP, k_TKP, v_TKP, layout, cache).flatten(-2))


def rotary_angles(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, P] of position * theta^(-2i/P), the frequencies repeated for the two halves (Su et al. 2021)."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    angles = positions_T.to(torch.float32)[:, None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_THP: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Turn the pair (x_i, x_{i + P/2}) of each head by its angle; in x's dtype."""
    first, second = x_THP.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_THP * cos_TP[:, None].to(x_THP.dtype)) + (turned * sin_TP[:, None].to(x_THP.dtype))
