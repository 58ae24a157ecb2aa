"""The sizes a pruned model should have, and which parts remain then: the most important ones of each axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.config import ATTENTION, MAMBA, MLP, HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.selection import Indices, Kept


@dataclass(frozen=True)
class Target:
    """Sizes of the pruned model; None keeps the parent's. `drop_layers` names layers instead of their number."""

    layers: int | None = None
    drop_layers: tuple[int, ...] = ()
    hidden_size: int | None = None
    intermediate_size: int | None = None
    mamba_heads: int | None = None
    mamba_head_dim: int | None = None
    attention_heads: int | None = None

    @property
    def needs_scores(self) -> bool:
        """Whether anything but named layers is to go."""
        sizes = (
            self.layers,
            self.hidden_size,
            self.intermediate_size,
            self.mamba_heads,
            self.mamba_head_dim,
            self.attention_heads,
        )
        return any(size is not None for size in sizes)

    def check(self, config: HybridConfig) -> None:
        """Raises InputError, in one line with the nearest possible, where a model of shape `config` cannot be pruned to this."""
        count, keys = config.num_hidden_layers, config.num_key_value_heads
        if self.layers is not None and self.drop_layers:
            raise InputError("--layers and --drop-layers contradict each other: give one of the two")
        for layer in self.drop_layers:
            if not 0 <= layer < count:
                raise InputError(f"--drop-layers {layer}: there is no such layer, they are 0 to {count - 1}")
        if len(set(self.drop_layers)) >= count:
            raise InputError(f"--drop-layers names all {count} layers: at least one must remain")
        _check_size("--layers", self.layers, count)
        _check_size("--hidden-size", self.hidden_size, config.hidden_size)
        for flag, wanted, size, unit, of, kind in (
            ("--intermediate-size", self.intermediate_size, config.intermediate_size, 1, "", MLP),
            ("--mamba-heads", self.mamba_heads, config.mamba_num_heads, config.n_groups, "groups", MAMBA),
            ("--mamba-head-dim", self.mamba_head_dim, config.mamba_head_dim, 1, "", MAMBA),
            (
                "--attention-heads",
                self.attention_heads,
                config.num_attention_heads,
                keys,
                "key/value heads",
                ATTENTION,
            ),
        ):
            if wanted is not None and kind not in config.pattern:
                raise InputError(
                    f"{flag} {wanted}: this model has no such layers (its pattern is {config.pattern}); leave the flag out"
                )
            _check_size(flag, wanted, size, unit, of)

    def kept(self, config: HybridConfig, importance: Importance | None) -> Kept:
        """What remains of a model of shape `config`; `importance` may be None where only named layers go."""
        self.check(config)
        all_of = Kept.everything(config)
        if importance is None:
            if self.needs_scores:
                raise InputError(
                    "what to remove is chosen by importance: give --importance FILE, or --calibration to measure it"
                )
            layers = tuple(layer for layer in all_of.layers if layer not in self.drop_layers)
            return Kept(layers, all_of.hidden, *_of_layers(all_of, layers))
        importance.check(config)
        layers = self._layers(config, importance)
        channels = all_of.mamba_channels
        if channels and self.mamba_head_dim is not None:
            channels = best(importance.mamba_channels(), self.mamba_head_dim)

        def each(kind: str) -> list[int]:
            return [layer for layer in layers if config.pattern[layer] == kind]

        def heads(layer: int) -> Tensor:
            return importance.mamba_heads(layer, channels)

        neurons, queries = (
            self.intermediate_size or config.intermediate_size,
            self.attention_heads or config.num_attention_heads,
        )
        mambas = self.mamba_heads or config.mamba_num_heads
        return Kept(
            layers=layers,
            hidden=best(importance.embedding, self.hidden_size or config.hidden_size),
            ffn={layer: best(importance.ffn[layer], neurons) for layer in each(MLP)},
            mamba_heads={layer: best(heads(layer), mambas, config.n_groups) for layer in each(MAMBA)},
            mamba_channels=channels if each(MAMBA) else (),
            attention_heads={
                layer: best(importance.attention[layer], queries, config.num_key_value_heads)
                for layer in each(ATTENTION)
            },
        )

    def config(self, parent: HybridConfig, importance: Importance | None) -> HybridConfig:
        """The shape of what remains, without choosing which parts that are; `importance` ranks layers where their number is given."""
        self.check(parent)
        return parent.replace(
            pattern="".join(parent.pattern[layer] for layer in self._layers(parent, importance)),
            hidden_size=self.hidden_size or parent.hidden_size,
            intermediate_size=self.intermediate_size or parent.intermediate_size,
            mamba_num_heads=self.mamba_heads or parent.mamba_num_heads,
            mamba_head_dim=self.mamba_head_dim or parent.mamba_head_dim,
            num_attention_heads=self.attention_heads or parent.num_attention_heads,
        )

    def _layers(self, config: HybridConfig, importance: Importance | None) -> Indices:
        gone = set(self.drop_layers)
        if self.layers is not None and self.layers < config.num_hidden_layers:
            if importance is None or len(importance.order) != config.num_hidden_layers:
                raise InputError(
                    "the importance scores hold no ranking of layers: measure them with --calibration, or use --drop-layers"
                )
            gone = set(importance.order[: config.num_hidden_layers - self.layers])
        return tuple(layer for layer in range(config.num_hidden_layers) if layer not in gone)


def sizes_of(config: HybridConfig) -> dict[str, int]:
    """A model's sizes under the names that a target has for them."""
    return {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "mamba_heads": config.mamba_num_heads,
        "mamba_head_dim": config.mamba_head_dim,
        "attention_heads": config.num_attention_heads,
    }


def best(scores: Tensor, keep: int, groups: int = 1) -> Indices:
    """The `keep` highest scores, as many in each of `groups` equal runs; ascending indices. The first of equals wins."""
    size = len(scores) // groups
    chosen: list[int] = []
    for group in range(groups):
        order = torch.argsort(
            scores[group * size : (group + 1) * size].double(), descending=True, stable=True
        )
        chosen += [group * size + int(i) for i in order[: keep // groups]]
    return tuple(sorted(chosen))


def _of_layers(
    kept: Kept, layers: Sequence[int]
) -> tuple[dict[int, Indices], dict[int, Indices], Indices, dict[int, Indices]]:
    def some(table: object) -> dict[int, Indices]:
        return {layer: indices for layer, indices in dict(table).items() if layer in layers}  # type: ignore[call-overload]

    heads = some(kept.mamba_heads)
    return some(kept.ffn), heads, kept.mamba_channels if heads else (), some(kept.attention_heads)


def _check_size(flag: str, wanted: int | None, most: int, unit: int = 1, of: str = "") -> None:
    if wanted is None:
        return
    if not unit <= wanted <= most:
        raise InputError(
            f"{flag} {wanted}: the parent has {most}, possible are {unit} to {most}; nearest {max(unit, min(wanted, most))}"
        )
    if wanted % unit:
        below = wanted // unit * unit
        near = f"{below} or {below + unit}" if below else str(unit)
        raise InputError(
            f"{flag} {wanted}: each of the {unit} {of} must keep as many, so it must be a multiple of {unit}; nearest {near}"
        )
