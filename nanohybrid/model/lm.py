"""The language model: embeddings, blocks of norm and mixer on a residual stream, a final norm, a head.

T tokens of the ragged batch · B, T a rectangular batch · E embedding · V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanohybrid.config import HybridConfig
from nanohybrid.executors.cpu.weights import PackedLinear
from nanohybrid.model.cache import HybridCache
from nanohybrid.model.initialize import initialize
from nanohybrid.model.mixers.base import embedding, linear
from nanohybrid.model.norms import RMSNorm
from nanohybrid.model.quantized import QuantizedLinear
from nanohybrid.model.spec import MIXERS
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.residual_norm import residual_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nanohybrid.executors.cpu.forward import CompiledForward


class Block(nn.Module):
    """h + mixer(norm(h))."""

    def __init__(self, config: HybridConfig, kind: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[kind](config)

    def forward(self, h_TE: Tensor, layout: Layout, state: dict[str, Tensor] | None) -> Tensor:
        return h_TE + self.mixer(self.norm(h_TE), layout, state)


class Backbone(nn.Module):
    """Everything but the head, under the names of the official checkpoints."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.embeddings = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class HybridLM(nn.Module):
    """A hybrid language model. Training, prefill, chunked prefill and decode are one forward under different layouts.

    A new model's parameters are uninitialized unless `seed` is given or `reset_parameters` is called; `load` fills them.
    """

    def __init__(self, config: HybridConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.packed = False  # whether executors/cpu/weights.py laid out the linears for the CPU kernels
        self.backbone = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head: nn.Linear | QuantizedLinear | PackedLinear = linear(
                config.hidden_size, config.vocab_size
            )
        if seed is not None:
            self.reset_parameters(seed)

    def reset_parameters(self, seed: int = 0) -> None:
        """Initialize every parameter in place (Mamba-2's and Nemotron-H's rules), to the same numbers on every device."""
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
        """[V, E]: the head's weight, which the losses read chunk by chunk; of a quantized or packed head a new tensor each time."""
        if self.config.tie_word_embeddings:
            return self.backbone.embeddings.weight
        return (
            self.lm_head.weight
            if isinstance(self.lm_head, nn.Linear)
            else self.lm_head.dequantized(self.dtype)
        )

    def hidden(self, tokens_T: Tensor, layout: Layout, state: HybridCache | None = None) -> Tensor:
        """Final hidden states [T, E], after the last norm. tokens: int64 ids below V.

        state: the pools that the layout's slots and pages point into, updated in place; None in training. What is stored has
        no gradient, so with a state nothing has one.
        """
        if state is None:
            h_TE = self.backbone.embeddings(tokens_T)
            for block in self.backbone.layers:
                h_TE = block(h_TE, layout, None)
            return self.backbone.norm_f(h_TE)
        if self.packed and (forward := self._compiled(state)) is not None:
            return forward.run(tokens_T, layout, state)[0]
        return self._hidden_stored(tokens_T, layout, state)

    def step(
        self, tokens_T: Tensor, layout: Layout, state: HybridCache, wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states [T, E] and logits in fp32 [len(wanted), V] of these rows, which ascend: `hidden` and `head`, in one call
        where the model's kernels do both."""
        if self.packed and (forward := self._compiled(state)) is not None and forward.head is not None:
            return forward.run(tokens_T, layout, state, wanted)
        hidden_TE = self.hidden(tokens_T, layout, state)
        if not wanted:
            return hidden_TE, torch.empty(0)
        every = len(wanted) == layout.tokens
        return hidden_TE, self.head(
            hidden_TE if every else hidden_TE[torch.tensor(wanted, device=hidden_TE.device)]
        )

    @torch.no_grad()
    def _hidden_stored(self, tokens_T: Tensor, layout: Layout, state: HybridCache) -> Tensor:
        """The same numbers, each addition to the stream made together with the norm that follows it."""
        blocks = cast("list[Block]", list(self.backbone.layers))
        norms = [*(block.norm for block in blocks), self.backbone.norm_f]
        h_TE = self.backbone.embeddings(tokens_T)
        normed_TE = norms[0](h_TE)
        for block, norm, pools in zip(blocks, norms[1:], state.layers, strict=True):
            h_TE, normed_TE = residual_norm(
                h_TE, block.mixer(normed_TE, layout, pools), norm.weight, norm.eps
            )
        return normed_TE

    def alike(self, state: HybridCache) -> bool:
        """Whether what a forward with this state computes for a token is the same bits whatever shares the batch and however its
        sequence is cut into calls: of a packed model, by the order of its kernels' sums (executors/cpu/kernels/forward.py)."""
        return self.packed and not self.config.tie_word_embeddings and self._compiled(state) is not None

    def _compiled(self, state: HybridCache) -> CompiledForward | None:
        from nanohybrid.executors.cpu.forward import compiled_forward  # here, since it needs numba

        return compiled_forward(self, state)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in fp32, [..., V]."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.backbone.embeddings.weight).to(dtype)
        return (
            self.lm_head(hidden, dtype)
            if isinstance(self.lm_head, PackedLinear)
            else self.lm_head(hidden).to(dtype)
        )

    def forward(
        self, tokens: Tensor, layout: Layout | None = None, state: HybridCache | None = None
    ) -> Tensor:
        """Logits of every token in fp32: [B, T] without a layout gives [B, T, V]; [T] with one gives [T, V]."""
        if layout is not None:
            return self.head(self.hidden(tokens, layout, state))
        if tokens.ndim != 2:
            raise ValueError(f"tokens without a layout must be [batch, length], not {tuple(tokens.shape)}")
        hidden = self.hidden(tokens.flatten(), Layout.equal(*tokens.shape), state)
        return self.head(hidden).unflatten(0, tuple(tokens.shape))
