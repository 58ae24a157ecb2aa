"""The torch executor: the plain model, with each residual addition fused with the next norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from nanohybrid.executors.executor import Executor
from nanohybrid.model.cache import HybridCache
from nanohybrid.model.lm import Block, HybridLM
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.residual_norm import residual_norm


class TorchExecutor(Executor):
    """Any model on any device, with the ops' forms for that device."""

    name = "torch"

    def __init__(self, model: HybridLM, cache: HybridCache) -> None:
        super().__init__(model, cache)
        cache.claim("rows")

    @torch.no_grad()
    def run(self, tokens_T: Tensor, layout: Layout, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        hidden_TE = self.hidden(tokens_T, layout)
        if not wanted:
            return hidden_TE, torch.empty(0)
        if len(wanted) == layout.tokens:
            return hidden_TE, self.model.head(hidden_TE)
        return hidden_TE, self.model.head(hidden_TE[torch.tensor(wanted, device=hidden_TE.device)])

    @torch.no_grad()
    def hidden(self, tokens_T: Tensor, layout: Layout) -> Tensor:
        """Final hidden states [T, E], after the last norm."""
        backbone = self.model.backbone
        blocks = cast("list[Block]", list(backbone.layers))
        norms = [*(block.norm for block in blocks), backbone.norm_f]
        h_TE = backbone.embeddings(tokens_T)
        normed_TE = norms[0](h_TE)
        for block, norm, cache in zip(blocks, norms[1:], self.cache.layers, strict=True):
            update_TE = block.mixer(normed_TE, layout, cache)
            h_TE, normed_TE = residual_norm(h_TE, update_TE, norm.weight, norm.eps)
        return normed_TE
