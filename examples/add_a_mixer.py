"""Add a kind of layer in one file: attention over a sliding window, with a cache that does not grow.

    python examples/add_a_mixer.py   # builds, saves, loads, plans, prunes, generates, verifies

Registering the class is all. Configuration, loading, saving, counting, memory plans, pruning, plots and
executors read the facts that it declares. The CPU kernels do not know this kind, so packing refuses it and
the torch executor runs the model."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import nanohybrid
from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.mixers import Attention, AttentionFields, CacheSpec, MixerSpec, register
from nanohybrid.model.mixers.checks import check_int
from nanohybrid.ops.attention import RingCache, window_attention


@dataclass(frozen=True, kw_only=True)
class WindowFields(AttentionFields):
    """The configuration fields of this kind: those of attention, and one more."""

    sliding_window: int = 4096


@register
class WindowAttention(Attention):
    """Attention to the last `sliding_window` tokens. Projections and query heads to prune are attention's."""

    symbol, label, color, fields = "W", "window attention", "#b5539c", WindowFields

    @classmethod
    def declare(cls, config: WindowFields) -> MixerSpec:
        row = CacheSpec(("num_key_value_heads", "head_dim"), "window", window=config.sliding_window)
        return MixerSpec(super().declare(config).parameters, cache={"key": row, "value": row})

    def forward(self, x_TE: Tensor, layout: nanohybrid.Layout, cache: LayerCache | None) -> Tensor:
        ring = None if cache is None else RingCache.of(cache)
        window = self.config.sliding_window
        return self.o_proj(window_attention(*self.project(x_TE, layout), layout, window, ring).flatten(-2))

    @classmethod
    def check(cls, config: WindowFields) -> None:
        super().check(config)
        check_int("sliding_window", config.sliding_window)

    @classmethod
    def mixing_flops(cls, config: WindowFields, tokens: int, position: int) -> int:
        seen = min(position + tokens, config.sliding_window)
        return 4 * config.num_attention_heads * config.head_dim * tokens * seen


def main() -> None:
    from nanohybrid.engine.random_weights import stand_in_tokenizer
    from nanohybrid.estimate import Footprint
    from nanohybrid.verify import verify

    config = nanohybrid.preset("tiny").replace(pattern="M-W-*-W-", sliding_window=16)
    model = nanohybrid.HybridLM(config, seed=0)
    footprint = Footprint.of(config, torch.float32)
    print(f"{footprint.parameters_by_part['window attention']:,} parameters in window attention")
    print(f"{footprint.kv_bytes_per_token} bytes a token, {footprint.state_bytes_per_sequence:,} a sequence")
    with tempfile.TemporaryDirectory() as directory:
        nanohybrid.save(model, directory)
        stand_in_tokenizer(config).save(Path(directory))
        llm = nanohybrid.LLM(directory)
        assert llm.model.config == config
        print(llm.generate(["Hello"], nanohybrid.SamplingParams(max_tokens=8))[0].token_ids)
    assert all(check.passed for check in verify(model))
    print("saved, loaded, generated, verified")


if __name__ == "__main__":
    main()
