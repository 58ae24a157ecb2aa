"""Compression: importance, pruning to a memory budget, distillation from the parent."""

from nanohybrid.compress.search import Grid
from nanohybrid.compress.stage import CompressRecipe, compress
from nanohybrid.distill.stage import DistillRecipe, distill
from nanohybrid.estimate.budget import Budget
from nanohybrid.prune.selection import Kept
from nanohybrid.prune.slicing import prune_checkpoint, prune_model, prune_state
from nanohybrid.prune.stage import PruneRecipe
from nanohybrid.prune.target import Target

__all__ = [
    "Budget",
    "CompressRecipe",
    "DistillRecipe",
    "Grid",
    "Kept",
    "PruneRecipe",
    "Target",
    "compress",
    "distill",
    "prune_checkpoint",
    "prune_model",
    "prune_state",
]
