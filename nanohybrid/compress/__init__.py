"""Compression: importance, pruning to a memory budget, distillation from the parent."""

from nanohybrid.compress.budget import Budget
from nanohybrid.compress.distill import DistillRecipe, distill
from nanohybrid.compress.kept import Kept
from nanohybrid.compress.prune import prune_checkpoint, prune_model, prune_state
from nanohybrid.compress.prune_stage import PruneRecipe
from nanohybrid.compress.search import Grid
from nanohybrid.compress.stage import CompressRecipe, compress
from nanohybrid.compress.target import Target

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
