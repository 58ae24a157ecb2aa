"""Compression: importance, pruning to a memory budget, distillation from the base model."""

from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.search import Grid
from nanohybrid.compress.stage import compress
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.distill.stage import distill
from nanohybrid.estimate.budget import Budget
from nanohybrid.prune.selection import Selection
from nanohybrid.prune.slicing import prune_checkpoint, prune_model, prune_state
from nanohybrid.prune.stage import PruneRecipe
from nanohybrid.prune.target import Target

__all__ = [
    "Budget",
    "CompressRecipe",
    "DistillRecipe",
    "Grid",
    "PruneRecipe",
    "Selection",
    "Target",
    "compress",
    "distill",
    "prune_checkpoint",
    "prune_model",
    "prune_state",
]
