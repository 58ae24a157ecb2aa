"""What matters in a model, measured on a calibration set: scores by axis and by layer, and the rankings made of them.

L layers · E embedding · F FFN width · H heads · P head dimension.
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

FILE = "importance.safetensors"
PER_LAYER = ("ffn", "mamba", "attention")


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores, the higher the more a model loses without it. Keys of the tables are layers, in the model's numbering.

    embedding [E]; ffn {layer: [F]}; mamba {layer: [H, P]}; attention {layer: [H]}; layers [L], the mean squared change of the
    logits without that layer, and cosine [L], how far a layer turns the hidden state: 1 minus the cosine between what enters and what
    leaves it (both empty where they were not measured). order: layers from the first that should go to the last.
    facts: what the scores were measured on and how.
    """

    embedding: Tensor
    ffn: Mapping[int, Tensor]
    mamba: Mapping[int, Tensor]
    attention: Mapping[int, Tensor]
    layers: Tensor = field(default_factory=lambda: torch.zeros(0))
    order: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    cosine: Tensor = field(default_factory=lambda: torch.zeros(0))

    def mamba_channels(self) -> Tensor:
        """[P]: one score for a channel of all heads: L2 over the heads of a layer, summed over layers (paper, section 5)."""
        return torch.stack([scores_HP.norm(dim=0) for scores_HP in self.mamba.values()]).sum(0)

    def mamba_heads(self, layer: int, channels: Sequence[int]) -> Tensor:
        """[H]: the score of each head of a layer: L2 over the channels that are kept."""
        return self.mamba[layer][:, list(channels)].norm(dim=1)

    def with_layers(self, layers: Tensor, order: Sequence[int], rounds: int = 0, **facts: Any) -> Importance:
        """The same scores with those of whole layers, and how many places of their order were found iteratively."""
        return replace(
            self, layers=layers, order=tuple(order), facts={**self.facts, "rounds": rounds, **facts}
        )

    def save(self, directory: Path) -> Path:
        """Write `importance.safetensors` and a readable `importance.json` of what it was measured on."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {"embedding": self.embedding, "layers": self.layers, "cosine": self.cosine}
        for name in PER_LAYER:
            tensors |= {f"{name}.{layer}": scores for layer, scores in getattr(self, name).items()}
        facts = {**self.facts, "order": list(self.order)}
        data = save(
            {name: tensor.float().contiguous() for name, tensor in tensors.items()},
            {"facts": json.dumps(facts)},
        )
        atomic_write(directory / FILE, data)
        atomic_write(
            directory / "importance.json",
            json.dumps({**facts, "layers": self.layers.tolist()}, indent=2) + "\n",
        )
        return directory / FILE

    @classmethod
    def load(cls, path: Path) -> Importance:
        """Read what `save` wrote; `path` is the file or its directory."""
        file = path / FILE if path.is_dir() else path
        try:
            with safe_open(file, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                facts = json.loads((stored.metadata() or {})["facts"])
            order = tuple(facts.pop("order"))
            tables = {
                name: {int(key.split(".")[1]): t for key, t in tensors.items() if key.startswith(f"{name}.")}
                for name in PER_LAYER
            }
            tables = {name: dict(sorted(table.items())) for name, table in tables.items()}
            cosine = tensors.get("cosine", torch.zeros(0))  # older files have none
            return cls(
                tensors["embedding"],
                layers=tensors["layers"],
                order=order,
                facts=facts,
                cosine=cosine,
                **tables,
            )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{file}: not a file of importance scores ({error}); `nanohybrid compress` writes one"
            ) from None

    def check(self, config: HybridConfig) -> None:
        """Raises InputError where the scores are of a model of another shape."""
        kinds = {"ffn": "-", "mamba": "M", "attention": "*"}
        layers = {
            name: [i for i, kind in enumerate(config.pattern) if kind == kinds[name]] for name in PER_LAYER
        }
        sizes = {"ffn": (config.intermediate_size,), "mamba": (config.mamba_num_heads, config.mamba_head_dim)}
        sizes["attention"] = (config.num_attention_heads,)
        right = self.embedding.shape == (config.hidden_size,) and all(
            list(getattr(self, name)) == layers[name]
            and all(t.shape == sizes[name] for t in getattr(self, name).values())
            for name in PER_LAYER
        )
        if not right:
            raise InputError(
                "the importance scores are of a model of another shape: measure them again with --calibration"
            )
