"""Importance scores of a model, measured on calibration documents: by entry of each prunable axis, and by
layer.

L layers · E hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.files import atomic_write
from nanohybrid.prune import old_layout
from nanohybrid.prune.prunable import HIDDEN, layer_axes

FILE = "importance.safetensors"
LAYER = "layer."


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores; the higher one is, the more the model loses without that entry. Keys of the tables are layers,
    from 0.

    hidden_size [E]. scores: of each layer with prunable axes one tensor over their product, with axes[layer]
    as the names of its dimensions: [F] of an MLP, [H] of attention, [H, P] of Mamba-2. layers [L]: the mean
    squared change of the logits without that layer. cosine [L]: 1 minus the cosine between what enters a
    layer and what leaves it. Both are empty where they were not measured. order: the layers, the least
    important first. facts: what the scores were measured on, and how.
    """

    hidden_size: Tensor
    scores: Mapping[int, Tensor]
    axes: Mapping[int, tuple[str, ...]]
    layers: Tensor = field(default_factory=lambda: torch.zeros(0))
    order: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    cosine: Tensor = field(default_factory=lambda: torch.zeros(0))

    def of_shared(self, axis: str) -> Tensor:
        """One score for each entry of an axis that all layers share: L2 within a layer, summed over layers
        (paper, section 5)."""
        if axis == HIDDEN:
            return self.hidden_size
        found = [
            over_axis(scores, self.axes[layer], axis)
            for layer, scores in self.scores.items()
            if axis in self.axes[layer]
        ]
        return torch.stack(found).sum(0)

    def of_layer(self, layer: int, axis: str, selected: Mapping[str, Sequence[int]]) -> Tensor:
        """One score for each entry of an axis in a layer: L2 over its other axes, of `selected` axes over
        those entries alone."""
        names, scores = self.axes[layer], self.scores[layer]
        return over_axis(take(scores, names, {n: of for n, of in selected.items() if n != axis}), names, axis)

    def with_layers(self, layers: Tensor, order: Sequence[int], rounds: int = 0, **facts: Any) -> Importance:
        """The same scores with those of whole layers, and how many places of their order were found
        iteratively."""
        return replace(
            self, layers=layers, order=tuple(order), facts={**self.facts, "rounds": rounds, **facts}
        )

    def save(self, directory: Path) -> Path:
        """Write `importance.safetensors`, and `importance.json`, a readable account of what was measured."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {HIDDEN: self.hidden_size, "layers": self.layers, "cosine": self.cosine}
        tensors |= {f"{LAYER}{layer}": scores for layer, scores in self.scores.items()}
        facts = {**self.facts, "order": list(self.order)}
        axes = {str(layer): list(names) for layer, names in self.axes.items()}
        data = save(
            {name: tensor.float().contiguous() for name, tensor in tensors.items()},
            {"facts": json.dumps(facts), "axes": json.dumps(axes)},
        )
        atomic_write(directory / FILE, data)
        account = {**facts, "layers": self.layers.tolist()}
        atomic_write(directory / "importance.json", json.dumps(account, indent=2) + "\n")
        return directory / FILE

    @classmethod
    def load(cls, path: Path) -> Importance:
        """Read what `save` wrote, in this release or the last; `path` is the file or its directory.

        Raises InputError where it holds no scores.
        """
        file = path / FILE if path.is_dir() else path
        try:
            with safe_open(file, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                metadata = stored.metadata() or {}
            facts = json.loads(metadata["facts"])
            facts = {old_layout.FACTS.get(name, name): value for name, value in facts.items()}
            order = tuple(facts.pop("order"))
            if "axes" in metadata:
                axes = {int(layer): tuple(names) for layer, names in json.loads(metadata["axes"]).items()}
                scores = {layer: tensors[f"{LAYER}{layer}"] for layer in axes}
            else:
                scores, axes = old_layout.scores_from(tensors)
                tensors[HIDDEN] = tensors["embedding"]
            return cls(
                tensors[HIDDEN],
                dict(sorted(scores.items())),
                dict(sorted(axes.items())),
                layers=tensors["layers"],
                order=order,
                facts=facts,
                cosine=tensors.get("cosine", torch.zeros(0)),  # older files have none
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}: not a file of importance scores ({error}); `nanohybrid compress` writes one"
            ) from None

    def check(self, config: HybridConfig) -> None:
        """Raise InputError where the scores are of a model of another shape."""
        wanted = {
            layer: {one.axis: getattr(config, one.axis) for one in layer_axes(kind)}
            for layer, kind in enumerate(config.pattern)
        }
        wanted = {layer: sizes for layer, sizes in wanted.items() if sizes}
        found = {
            layer: dict(zip(names, self.scores[layer].shape, strict=False))
            for layer, names in self.axes.items()
        }
        if self.hidden_size.shape != (config.hidden_size,) or found != wanted:
            raise InputError(
                "the importance scores are of a model of another shape: measure them again with --calibration"
            )


def over_axis(scores: Tensor, names: Sequence[str], axis: str, before: int = 0) -> Tensor:
    """The L2 norm over all axes but one. before: dimensions in front of the named ones, which stay."""
    others = tuple(before + place for place, name in enumerate(names) if name != axis)
    return scores.norm(dim=others) if others else scores


def take(scores: Tensor, names: Sequence[str], selected: Mapping[str, Sequence[int]]) -> Tensor:
    """The entries of `selected` axes."""
    for place, name in enumerate(names):
        if name in selected:
            place_of: tuple[Any, ...] = (*[slice(None)] * place, list(selected[name]))
            scores = scores[place_of]
    return scores
