"""Rank stability: Spearman's correlation between the scores on two halves of the samples.

It tells how far a ranking is the model's and not the samples'. R: row 0 all samples, rows 1 and 2 the two
halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

from nanohybrid.prune.importance import over_axis
from nanohybrid.prune.prunable import HIDDEN, prunable_axes


def agreement(
    pattern: str,
    hidden_RE: Tensor,
    scores: Mapping[int, Tensor],
    axes: Mapping[int, tuple[str, ...]],
    cosine_RL: Tensor,
) -> dict[str, float]:
    """By axis: 1 where both halves rank alike, 0 where they have nothing in common; of layers' own axes the
    mean over layers.

    scores: of each layer [R, ...] over its `axes`.
    """
    found = {
        HIDDEN: spearman(hidden_RE[1], hidden_RE[2]),
        "layers_by_cosine": spearman(cosine_RL[1], cosine_RL[2]),
    }
    for name, one in prunable_axes(pattern).items():
        rows = [
            over_axis(table, axes[layer], name, 1) for layer, table in scores.items() if name in axes[layer]
        ]
        if rows and one.shared:
            rows = [torch.stack(rows).sum(0)]
        if rows:
            found[name] = fmean(spearman(row[1], row[2]) for row in rows)
    return {name: round(value, 4) for name, value in found.items()}


def spearman(first: Tensor, second: Tensor) -> float:
    """The rank correlation of two lists of scores; 1 where there is nothing to rank."""
    if len(first) < 2:
        return 1.0
    ranks = torch.stack([first.argsort().argsort(), second.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])
