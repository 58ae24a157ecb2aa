"""The table of contents as an executable: six calls, one a stage. Each is a command of its own too (docs/quickstart.md)."""

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
from nanohybrid.quickstart.summary import Places, summarize, write_summary
from nanohybrid.train.allocator import keep_freed_memory
from nanohybrid.train.pretrain import pretrain


def quickstart(out: Path, scale: float = 1.0, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Run every stage into `out`, or what is left of it after an interruption; returns what `out/summary.json` holds.

    device: where all that has a model is computed.
    """
    begin = time.monotonic()
    for module in ("rensa", "matplotlib"):
        require(module, "data,train")  # at once, not when a stage comes to it
    keep_freed_memory()
    recipes, places = Recipes.of(scale, seed), Places(out)

    announce("1/6 data: text and code of this Python, problems with worked solutions")
    data = build(recipes.data, places.data)

    announce(
        "2/6 pretrain: a hybrid in the 12B's proportions; a pair of short runs in bf16 and FP8; a Transformer on the same tokens"
    )
    base = pretrain(recipes.pretrain, data, places.base, device)
    pretrain(recipes.twin_bf16, data, places.twin_bf16, device)
    pretrain(recipes.twin_fp8, data, places.twin_fp8, device)
    dense = pretrain(recipes.dense, data, places.dense_base, device)

    announce("3/6 align: chats with and without thinking, truncated traces; then rewards for right answers")
    chat = sft(recipes.sft, base, places.sft, data, device)
    transformer = sft(recipes.sft, dense, places.transformer, data, device)
    parent = grpo(recipes.grpo, chat, places.parent, device)

    announce("4/6 compress: score, search under a budget, prune, distill from the aligned parent")
    distilled = compress(recipes.compress, parent, chat, places.distilled, data, device)

    announce("5/6 evaluate: thinking on and off, against budget; time and memory against context")
    models = {
        "parent": parent,
        "pruned": places.pruned,
        "distilled": distilled,
        "transformer": transformer,
        "sft": chat,
    }
    evaluate(recipes.evaluate, models, places.evaluation, data, device)

    announce("6/6 report")
    summary = summarize(places, models, time.monotonic() - begin)
    write_report(places, recipes, summary)
    return write_summary(places, summary)


def announce(stage: str) -> None:
    """Say on stderr which stage begins."""
    print(f"== {stage}", file=sys.stderr, flush=True)
