"""The batches of a distillation: post-training documents mixed with pretraining documents, 70 to 30 by
default (paper, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nanohybrid.data import Batch, Loader, TokenStore
from nanohybrid.data.store import STORES
from nanohybrid.distill.recipe import DistillRecipe, SequenceLengthStep
from nanohybrid.prune.calibration import VALIDATION, store_paths

POST, PRE = "post", "pre"
"""Prefixes of the names of stores, by what their documents are for."""


class DistillLoader:
    """Batches by step. The sequence length may change between steps."""

    def __init__(
        self, recipe: DistillRecipe, stores: Mapping[str, TokenStore], weights: Mapping[str, float]
    ) -> None:
        self.steps = recipe.steps
        self.schedule = recipe.sequence_length_schedule or (SequenceLengthStep(1.0, recipe.sequence_length),)
        self.loaders = [
            Loader(
                stores, [(1.0, weights)], recipe.batch_tokens, one.sequence_length, recipe.seed, recipe.steps
            )
            for one in self.schedule
        ]

    def batch(self, step: int) -> Batch:
        """The batch of a step. Steps past the end continue the last part of the schedule."""
        index = next((i for i, one in enumerate(self.schedule) if step < one.until * self.steps), -1)
        return self.loaders[index].batch(step)

    @property
    def last(self) -> Loader:
        """The loader of the last part of the schedule."""
        return self.loaders[-1]


def mixture(
    recipe: DistillRecipe, data: Path, pretraining: Path | None
) -> tuple[dict[str, TokenStore], dict[str, float]]:
    """The stores by name and their weights: within post-training and within pretraining, each store by its
    size."""
    groups = {POST: (data, recipe.post_training_share if pretraining else 1.0)}
    if pretraining is not None and recipe.post_training_share < 1:
        groups[PRE] = (pretraining, 1 - recipe.post_training_share)
    stores: dict[str, TokenStore] = {}
    weights: dict[str, float] = {}
    for group, (folder, share) in groups.items():
        found: Mapping[str, TokenStore] = {
            f"{group}-{path.stem}": TokenStore.read(path) for path in store_paths(folder)
        }
        total = sum(store.token_count for store in found.values())
        stores |= found
        weights |= {name: share * store.token_count / max(total, 1) for name, store in found.items()}
    return stores, weights


def evaluation_batches(recipe: DistillRecipe, data: Path, loader: DistillLoader) -> list[Batch]:
    """The batches on which the divergence is measured: of held-out documents of `data` where it has some,
    else of the steps after the last one."""
    folder = data / STORES if (data / STORES).is_dir() else data
    held_out = {
        path.stem: TokenStore.read(path) for path in sorted(folder.glob(f"{VALIDATION}*.safetensors"))
    }
    count = max(1, recipe.measured_tokens // recipe.batch_tokens)
    if not held_out:
        return [loader.batch(recipe.steps + number) for number in range(count)]
    weights = {name: float(store.token_count) for name, store in held_out.items()}
    measured = Loader(held_out, [(1.0, weights)], recipe.batch_tokens, recipe.sequence_length, 0, count)
    return [measured.batch(number) for number in range(count)]
