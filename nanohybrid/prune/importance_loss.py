"""How promising a shape is before it is tried: the importance that it would lose.

Of each axis the share of the squared scores that would go, averaged over the layers that have the axis; of depth the share of the
layers' scores. The shares of all axes are added. It costs no forward pass, so that a large grid needs only its best to be tried.
"""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.target import Target, best


class Promise:
    """Judges shapes for one model; what each axis loses is worked out once for every width."""

    def __init__(self, config: HybridConfig, importance: Importance) -> None:
        self.config, self.importance = config, importance
        groups = config.num_key_value_heads
        self.embedding = curve(importance.embedding)
        self.ffn = [curve(scores) for scores in importance.ffn.values()]
        self.attention = [curve(scores, groups) for scores in importance.attention.values()]
        self.mamba: dict[tuple[int, int], float] = {}

    def lost(self, target: Target) -> float:
        """From 0 for the whole model upwards."""
        config = self.config
        neurons, queries = (
            target.intermediate_size or config.intermediate_size,
            target.attention_heads or config.num_attention_heads,
        )
        total = 1 - float(self.embedding[target.hidden_size or config.hidden_size])
        total += 1 - fmean(float(axis[neurons]) for axis in self.ffn) if self.ffn else 0.0
        total += 1 - fmean(float(axis[queries]) for axis in self.attention) if self.attention else 0.0
        total += self._mamba(
            target.mamba_heads or config.mamba_num_heads, target.mamba_head_dim or config.mamba_head_dim
        )
        return total + self._layers(target)

    def _mamba(self, heads: int, channels: int) -> float:
        if not self.importance.mamba:
            return 0.0
        if (heads, channels) not in self.mamba:
            kept = best(self.importance.mamba_channels(), channels)
            shares = []
            for layer, scores_HP in self.importance.mamba.items():
                rows = best(self.importance.mamba_heads(layer, kept), heads, self.config.n_groups)
                energy_HP = scores_HP.double().square()
                shares.append(
                    float(energy_HP[list(rows)][:, list(kept)].sum() / energy_HP.sum().clamp(min=1e-300))
                )
            self.mamba[heads, channels] = 1 - fmean(shares)
        return self.mamba[heads, channels]

    def _layers(self, target: Target) -> float:
        scores = self.importance.layers.double()
        gone = 0 if target.layers is None else self.config.num_hidden_layers - target.layers
        return (
            float(scores[list(self.importance.order[:gone])].sum() / scores.sum().clamp(min=1e-300))
            if gone
            else 0.0
        )


def curve(scores: Tensor, groups: int = 1) -> Tensor:
    """[size + 1]: the share of the squared scores in the best k, as many from each group, at every k that the groups divide."""
    energy = scores.double().square().unflatten(0, (groups, -1)).sort(dim=1, descending=True).values.sum(0)
    shares = torch.cat([energy.new_zeros(1), energy.cumsum(0)]) / energy.sum().clamp(min=1e-300)
    return shares.repeat_interleave(groups)[: len(scores) + 1]
