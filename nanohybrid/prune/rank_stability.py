"""How far a ranking is the model's and not the samples': Spearman's correlation between scores on two halves of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

from nanohybrid.config import ATTENTION, MAMBA, MLP


def agreement(
    channels_RE: Tensor, tables: Mapping[str, Mapping[int, Tensor]], cosine_RL: Tensor
) -> dict[str, float]:
    """By axis: 1 where both halves rank alike, 0 where they have nothing in common; of layers' own axes the mean over layers.

    Row 1 of every tensor is one half's scores, row 2 the other's.
    """
    found = {
        "embedding": spearman(channels_RE[1], channels_RE[2]),
        "layers_by_cosine": spearman(cosine_RL[1], cosine_RL[2]),
    }
    for name, kind in (("ffn", MLP), ("attention_heads", ATTENTION)):
        if tables[kind]:
            found[name] = fmean(spearman(scores[1], scores[2]) for scores in tables[kind].values())
    if tables[MAMBA]:
        heads = [scores.norm(dim=2) for scores in tables[MAMBA].values()]
        found["mamba_heads"] = fmean(spearman(scores[1], scores[2]) for scores in heads)
        channels = torch.stack([scores.norm(dim=1) for scores in tables[MAMBA].values()]).sum(0)
        found["mamba_channels"] = spearman(channels[1], channels[2])
    return {name: round(value, 4) for name, value in found.items()}


def spearman(first: Tensor, second: Tensor) -> float:
    """The rank correlation of two lists of scores; 1 where there is nothing to rank."""
    if len(first) < 2:
        return 1.0
    ranks = torch.stack([first.argsort().argsort(), second.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])
