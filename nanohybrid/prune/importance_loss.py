"""The importance-loss proxy: which share of a model's importance a shape would lose.

Of each axis the share of the squared scores that goes, averaged over the layers that have the axis, and of
depth the share of the layers' scores; added up. It needs no forward pass, so a search tries only the best
shapes of a large grid.
"""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.prune.importance import Importance, take
from nanohybrid.prune.prunable import group_count, layer_axes, prunable_axes
from nanohybrid.prune.target import Target, best

Axes = tuple[str, ...]


class ImportanceLoss:
    """The proxy for one model. What each axis loses is computed once for every size."""

    def __init__(self, config: HybridConfig, importance: Importance) -> None:
        self.config, self.importance = config, importance
        self._shared = {name for name, one in prunable_axes(config.pattern).items() if one.shared}
        self._hidden = curve(importance.hidden_size)
        self._curves: dict[str, list[Tensor]] = {}  # of layers with one axis that is their own
        self._products: dict[Axes, list[int]] = {}  # of layers with several, or with a shared one
        for layer, axes in importance.axes.items():
            if len(axes) == 1 and axes[0] not in self._shared:
                groups = group_count(config, layer_axes(config.pattern[layer])[0])
                self._curves.setdefault(axes[0], []).append(curve(importance.scores[layer], groups))
            else:
                self._products.setdefault(axes, []).append(layer)
        self._known: dict[tuple[Axes, tuple[int, ...]], float] = {}

    def of(self, target: Target) -> float:
        """What a target loses: 0 where it keeps the whole model."""
        total = 1 - float(self._hidden[target.size_of("hidden_size", self.config)])
        for axis, curves in sorted(self._curves.items()):
            size = target.size_of(axis, self.config)
            total += 1 - fmean(float(shares[size]) for shares in curves)
        for axes in self._products:
            sizes = tuple(target.size_of(axis, self.config) for axis in axes)
            if (axes, sizes) not in self._known:
                self._known[axes, sizes] = self._product(axes, sizes)
            total += self._known[axes, sizes]
        return total + self._layers(target)

    def _product(self, axes: Axes, sizes: tuple[int, ...]) -> float:
        """What layers with these axes lose when all of them are shortened to these sizes."""
        wanted = dict(zip(axes, sizes, strict=True))
        shared = {
            axis: best(self.importance.of_shared(axis), size)
            for axis, size in wanted.items()
            if axis in self._shared
        }
        shares = []
        for layer in self._products[axes]:
            selected = dict(shared)
            for one in layer_axes(self.config.pattern[layer]):
                if one.axis not in shared:
                    scores = self.importance.of_layer(layer, one.axis, shared)
                    selected[one.axis] = best(scores, wanted[one.axis], group_count(self.config, one))
            energy = self.importance.scores[layer].double().square()
            shares.append(float(take(energy, axes, selected).sum() / energy.sum().clamp(min=1e-300)))
        return 1 - fmean(shares)

    def _layers(self, target: Target) -> float:
        scores = self.importance.layers.double()
        gone = 0 if target.layers is None else self.config.num_hidden_layers - target.layers
        if not gone:
            return 0.0
        return float(scores[list(self.importance.order[:gone])].sum() / scores.sum().clamp(min=1e-300))


def curve(scores: Tensor, groups: int = 1) -> Tensor:
    """[size + 1]: the share of the squared scores in the best k, as many from each group, at every k that the
    groups divide."""
    energy = scores.double().square().unflatten(0, (groups, -1)).sort(dim=1, descending=True).values.sum(0)
    shares = torch.cat([energy.new_zeros(1), energy.cumsum(0)]) / energy.sum().clamp(min=1e-300)
    return shares.repeat_interleave(groups)[: len(scores) + 1]
