"""Model configurations by name.

`nano-*` are those of the paper, except `nano-291m`; `qwen3-8b` is the paper's baseline; `tiny*` and `mini*`
train on two CPU cores. A `-dense` model is a matched baseline: Qwen3's architecture with about the parameters
of the hybrid, saved as a `qwen3` checkpoint.
"""

import difflib

from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError

_TINY = dict(
    vocab_size=512, hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=1,
    head_dim=32, mamba_num_heads=4, mamba_head_dim=64, n_groups=1, ssm_state_size=32, initializer_range=0.06,
    max_position_embeddings=32_768,
)  # fmt: skip
_DENSE = dict(rope_theta=10_000.0, qk_norm=True, mlp_activation="swiglu", layer_norm_epsilon=1e-6)

PRESETS = {
    "nano-12b-v2": dict(
        pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        vocab_size=131_072, hidden_size=5120, intermediate_size=20_480,
    ),
    "nano-9b-v2": dict(
        pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        vocab_size=131_072, hidden_size=4480, intermediate_size=15_680,
    ),
    "qwen3-8b": dict(
        pattern="*-" * 36, vocab_size=151_936, hidden_size=4096, intermediate_size=12_288,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=1e6, qk_norm=True,
        mlp_activation="swiglu", layer_norm_epsilon=1e-6, max_position_embeddings=40_960,
        bos_token_id=151_643, eos_token_id=151_645, pad_token_id=151_643,
    ),
    "nano-291m": dict(
        pattern="M-M-M-M*-M-M-M-M*-M-M-M-M-M-", vocab_size=32_768, hidden_size=1024, intermediate_size=4096,
        num_attention_heads=16, num_key_value_heads=4, head_dim=64, mamba_num_heads=32, mamba_head_dim=64,
    ),
    "tiny": dict(_TINY, pattern="M-M*-M-"),
    "tiny-dense": dict(_TINY, **_DENSE, pattern="*-*-*-", intermediate_size=448),
    "mini": dict(
        _TINY, pattern="M-M-M*-M-M-M*-M-", hidden_size=256, intermediate_size=1024,
        mamba_num_heads=8, num_attention_heads=8, num_key_value_heads=2,
    ),
    "mini-dense": dict(
        _TINY, **_DENSE, pattern="*-" * 6, hidden_size=256, intermediate_size=1280, num_attention_heads=8,
        num_key_value_heads=2
    ),
}  # fmt: skip


def preset(name: str) -> HybridConfig:
    """The configuration of a preset. Raises ConfigError, with the known names, for an unknown one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f", nearest {near[0]}" if near else ""
        raise ConfigError(f'no preset is called "{name}"{hint}; known are {", ".join(PRESETS)}')
    return HybridConfig(**PRESETS[name])  # type: ignore[arg-type]
