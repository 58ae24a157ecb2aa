"""The language model: embeddings, blocks of norm and mixer on a residual stream, a final norm, a head.

This is the plain forward that every executor (executors/) computes and is tested against.

T tokens of the ragged batch · B, T a rectangular batch · E hidden size · V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanohybrid.config import HybridConfig
from nanohybrid.model.cache import HybridCache
from nanohybrid.model.initialize import initialize
from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.mixers import MIXERS
from nanohybrid.model.mixers.base import embedding, linear
from nanohybrid.model.norms import RMSNorm
from nanohybrid.ops.layout import Layout


class Block(nn.Module):
    """h + mixer(norm(h))."""

    def __init__(self, config: HybridConfig, kind: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[kind](config)

    def forward(self, h_TE: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        return h_TE + self.mixer(self.norm(h_TE), layout, cache)


class Backbone(nn.Module):
    """Everything but the head, under the names of the official checkpoints."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.embeddings = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class HybridLM(nn.Module):
    """A hybrid language model.

    Training, prefill, chunked prefill and decode are one forward under different layouts.

    A new model's parameters are uninitialized unless `seed` is given or `reset_parameters` is called; `load`
    fills them.
    """

    def __init__(self, config: HybridConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size)
        if seed is not None:
            self.reset_parameters(seed)

    def reset_parameters(self, seed: int = 0) -> None:
        """Initialize every parameter in place by the rules of Mamba-2 and Nemotron-H, equal on every device."""
        initialize(self, self.config, torch.Generator().manual_seed(seed))

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: that of the embeddings, whatever the linears' weights are in."""
        return self.backbone.embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self.backbone.embeddings.weight.device

    @property
    def head_weight(self) -> Tensor:
        """[V, E] in the dtype of the activations: the head's weight, which the losses read chunk by chunk."""
        tied = self.config.tie_word_embeddings
        return (self.backbone.embeddings if tied else self.lm_head).weight.to(self.dtype)

    def hidden(self, tokens_T: Tensor, layout: Layout, cache: HybridCache | None = None) -> Tensor:
        """Final hidden states [T, E], after the last norm.

        tokens: int64 ids below V. cache: the memory that the layout's slots and pages point into, updated in
        place; None in training. What is stored has no gradient, so with a cache nothing has one.
        """
        if cache is not None:
            cache.claim("rows")
        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):
            h_TE = self.backbone.embeddings(tokens_T)
            for index, block in enumerate(self.backbone.layers):
                h_TE = block(h_TE, layout, None if cache is None else cache.layers[index])
            return self.backbone.norm_f(h_TE)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in fp32 (float64 for float64), [..., V]."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.backbone.embeddings.weight).to(dtype)
        return self.lm_head(hidden).to(dtype)

    def forward(
        self, tokens: Tensor, layout: Layout | None = None, cache: HybridCache | None = None
    ) -> Tensor:
        """Logits of every token in fp32: [B, T] without a layout gives [B, T, V]; [T] with one gives [T, V].

        Raises ValueError where tokens without a layout are not [batch, length].
        """
        if layout is not None:
            return self.head(self.hidden(tokens, layout, cache))
        if tokens.ndim != 2:
            raise ValueError(f"tokens without a layout must be [batch, length], not {tuple(tokens.shape)}")
        hidden = self.hidden(tokens.flatten(), Layout.equal(*tokens.shape), cache)
        return self.head(hidden).unflatten(0, tuple(tokens.shape))
