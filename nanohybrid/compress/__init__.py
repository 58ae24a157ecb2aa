"""Compression: importance, pruning to a memory budget, distillation from the parent."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanohybrid.compress.distill import DistillRecipe, distill
    from nanohybrid.compress.kept import Kept
    from nanohybrid.compress.prune import prune_model, prune_state
    from nanohybrid.compress.stage import CompressRecipe, compress
    from nanohybrid.compress.target import Target

_HOME = {
    "CompressRecipe": "stage", "DistillRecipe": "distill", "Kept": "kept", "Target": "target",
    "compress": "stage", "distill": "distill", "prune_model": "prune", "prune_state": "prune",
}  # fmt: skip
__all__ = ["CompressRecipe", "DistillRecipe", "Kept", "Target", "compress", "distill", "prune_model", "prune_state"]


def __getattr__(name: str) -> Any:  # lazily: pruning needs no training loop
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
