"""What a model is measured on and learns from where nobody named documents.

A checkpoint that an alignment wrote has its chats beside it (`stores`). For any other there is what every Python install brings, prose
and code, in the model's own tokens: enough to rank what fires and to see that nothing broke, not what a model that is to be used
deserves. Name documents like those that it will meet (`--data`).
"""

from __future__ import annotations

from pathlib import Path

from nanohybrid.data.build import build
from nanohybrid.data.mixture import Phase
from nanohybrid.data.recipe import DataRecipe
from nanohybrid.data.store import STORES

MEGABYTES = 1.5  # each of prose and of code: some hundred thousand tokens


def documents_for(model: Path, out: Path) -> Path:
    """A directory of token stores for the checkpoint `model`: its own, else one that is built in `out`."""
    if (model / STORES).is_dir():
        return model
    phases = (Phase(1.0, {"prose": 0.5, "code": 0.5}),)
    recipe = DataRecipe(
        tokenizer=model,
        tasks=(),
        phases=phases,
        near_duplicate_threshold=0,
        code_megabytes=MEGABYTES,
        prose_megabytes=MEGABYTES,
    )
    return build(recipe, out)
