"""The documents of a compression without `--data`.

A checkpoint that an alignment wrote has its chats beside it (`stores`). For any other checkpoint they are
prose and code that every Python installation contains, in the model's own tokens. That is enough to rank
activations and to see that nothing broke. For a model that will be used, give documents like those it will
meet (`--data`).
"""

from __future__ import annotations

from pathlib import Path

from nanohybrid.data.build import build
from nanohybrid.data.mixture import Phase
from nanohybrid.data.recipe import DataRecipe
from nanohybrid.data.store import STORES

MEGABYTES = 1.5
"""Of prose, and of code: some hundred thousand tokens."""


def documents_for(model: Path, out: Path) -> Path:
    """A directory of token stores for the checkpoint `model`: its own, else one that is built in `out`."""
    if (model / STORES).is_dir():
        return model
    recipe = DataRecipe(
        tokenizer=model,
        tasks=(),
        phases=(Phase(1.0, {"prose": 0.5, "code": 0.5}),),
        near_duplicate_threshold=0,
        code_megabytes=MEGABYTES,
        prose_megabytes=MEGABYTES,
    )
    return build(recipe, out)
