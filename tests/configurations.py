"""The table of tiny models that every property of the model, and of every executor, runs over."""

from typing import Any

BASE: dict[str, Any] = dict(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6,
    mamba_num_heads=4, mamba_head_dim=6, n_groups=2, ssm_state_size=5, initializer_range=0.2,
    max_position_embeddings=512,
)  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "mixed": dict(pattern="M-M*-M-"),
    "only mamba": dict(pattern="MM"),
    "only attention": dict(pattern="**"),
    "only mlp": dict(pattern="--"),
    "a group a head": dict(pattern="M*", n_groups=4, mamba_head_dim=5),
    "one group, one key head": dict(pattern="*M", n_groups=1, num_key_value_heads=1, conv_kernel=2),
    "a key head a head, odd sizes": dict(
        pattern="M*-", num_attention_heads=3, num_key_value_heads=3, head_dim=7, ssm_state_size=9
    ),
    "dense": dict(pattern="*-*-", rope_theta=1e4, qk_norm=True, mlp_activation="swiglu"),
    "llama": dict(
        pattern="*-*-", rope_theta=1e4, mlp_activation="swiglu", tie_word_embeddings=True, head_dim=8,
        rope_scaling={
            "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
    ),
    "yarn": dict(
        pattern="*-", rope_theta=1e4, mlp_activation="swiglu", head_dim=8,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "hybrid with rope": dict(
        pattern="M*-", rope_theta=500.0, qk_norm=True, mlp_activation="swiglu", head_dim=8,
        rope_scaling={"rope_type": "linear", "factor": 2.5},
    ),
    "tied, steps limited": dict(pattern="M-*", tie_word_embeddings=True, time_step_limit=(0.01, 0.2)),
}  # fmt: skip
