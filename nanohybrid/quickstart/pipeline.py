"""The stages of the quickstart in order. Each is also a command of its own (docs/quickstart.md)."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from nanohybrid.align.grpo import grpo
from nanohybrid.align.sft import sft
from nanohybrid.compress.stage import compress
from nanohybrid.data.build import build
from nanohybrid.evaluate.stage import evaluate
from nanohybrid.extras import require
from nanohybrid.quickstart.recipes import Recipes
from nanohybrid.quickstart.report import write_report
from nanohybrid.quickstart.summary import RunPaths, summarize, write_summary
from nanohybrid.train.allocator import keep_freed_memory
from nanohybrid.train.pretrain import pretrain


def quickstart(out: Path, scale: float = 1.0, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Run all stages into `out`, resuming an interrupted run. Returns the contents of `out/summary.json`.

    scale: multiplies tokens, problems and time. device: of all stages that have a model. Raises InputError
    for a bad scale, and MissingExtraError for a missing dependency, before any work.
    """
    begin = time.monotonic()
    for module in ("rensa", "matplotlib"):
        require(module, "data,train")  # checked now, not when a later stage needs it
    keep_freed_memory()
    recipes, paths = Recipes.of(scale, seed), RunPaths(out)

    announce("1/6 data: text and code of the Python installation, problems with reasoning traces")
    data = build(recipes.data, paths.data)

    announce(
        "2/6 pretrain: a hybrid in the 12B's proportions; two short runs to compare bf16 and FP8; a "
        "Transformer on the same tokens"
    )
    base = pretrain(recipes.pretrain, data, paths.base, device)
    pretrain(recipes.short_bf16, data, paths.short_bf16, device)
    pretrain(recipes.short_fp8, data, paths.short_fp8, device)
    dense = pretrain(recipes.dense, data, paths.dense_base, device)

    announce("3/6 align: SFT on chats with thinking, without, and with truncated traces; then GRPO")
    chat = sft(recipes.sft, base, paths.sft, data, device)
    transformer = sft(recipes.sft, dense, paths.transformer, data, device)
    aligned = grpo(recipes.grpo, chat, paths.aligned, device)

    announce(
        "4/6 compress: importance scores, architecture search under a memory budget, pruning, distillation "
        "from the aligned model"
    )
    distilled = compress(recipes.compress, aligned, chat, paths.distilled, data, device)

    announce(
        "5/6 evaluate: accuracy with and without thinking and vs. thinking budget; decode time and memory "
        "vs. context length"
    )
    models = {
        "parent": aligned,
        "pruned": paths.pruned,
        "distilled": distilled,
        "transformer": transformer,
        "sft": chat,
    }
    evaluate(recipes.evaluate, models, paths.evaluation, data, device)

    announce("6/6 report")
    summary = summarize(paths, models, time.monotonic() - begin)
    write_report(paths, recipes, summary)
    return write_summary(paths, summary)


def announce(stage: str) -> None:
    """Print the stage that starts to stderr."""
    print(f"== {stage}", file=sys.stderr, flush=True)
