"""A small model of the same architecture: for proofs that need a second copy, a gradient or the disk."""

from nanohybrid.config import KINDS, HybridConfig
from nanohybrid.model import HybridLM

LAYERS = 6


def small_config(config: HybridConfig) -> HybridConfig:
    """The same kinds of layers in the same order and options, a few of them, of small sizes."""
    kv_heads, groups = min(config.num_key_value_heads, 2), min(config.n_groups, 2)
    return config.replace(
        pattern=small_pattern(config.pattern),
        vocab_size=min(config.vocab_size, 256),
        hidden_size=min(config.hidden_size, 64),
        intermediate_size=min(config.intermediate_size, 96),
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads
        * min(config.num_attention_heads // max(config.num_key_value_heads, 1), 2),
        head_dim=min(config.head_dim, 16),
        n_groups=groups,
        mamba_num_heads=groups * min(config.mamba_num_heads // max(config.n_groups, 1), 2),
        mamba_head_dim=min(config.mamba_head_dim, 20),
        ssm_state_size=min(config.ssm_state_size, 16),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def small_pattern(pattern: str) -> str:
    """The first layers, and one of each kind that comes only later."""
    first = pattern[:LAYERS]
    return first + "".join(kind for kind in KINDS if kind in pattern and kind not in first)


def small_model(config: HybridConfig, seed: int = 0) -> HybridLM:
    return HybridLM(small_config(config), seed=seed)
