"""A small model of the same architecture: for checks that need a second copy, gradients or disk space."""

from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM

LAYERS = 6


def small_config(config: HybridConfig) -> HybridConfig:
    """The same kinds of layers in the same order and options, a few of them, of small sizes (Mixer.small)."""
    changes = dict(vocab_size=min(config.vocab_size, 256), hidden_size=min(config.hidden_size, 64))
    for mixer in dict.fromkeys(config.mixers):
        changes |= mixer.small(config)
    pattern = small_pattern(config.pattern)
    return config.replace(pattern=pattern, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes)


def small_pattern(pattern: str) -> str:
    """The first layers, and one of each kind that comes only later."""
    first = pattern[:LAYERS]
    return first + "".join(kind for kind in dict.fromkeys(pattern) if kind not in first)


def small_model(config: HybridConfig, seed: int = 0) -> HybridLM:
    return HybridLM(small_config(config), seed=seed)
