"""Parent and result at work on this machine: tokens a second of a decode step, and the bytes that they really hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint import load
from nanohybrid.compress.budget import Budget
from nanohybrid.evaluate.throughput import decode_times
from nanohybrid.model import HybridLM, State
from nanohybrid.model.packed import prepare

LONGEST = 4096  # tokens of context at which a step is timed, at most: a stage must not take minutes to say how fast it became
ROUNDS = 7


def at_work(models: Mapping[str, Path], budget: Budget) -> dict[str, dict[str, float]]:
    """By name: tokens a second of all sequences together, and bytes as they are allocated at the whole context.

    Of a few steps, in turns, the quickest counts.
    """
    dtype, context = budget.kind, min(budget.context, LONGEST)
    loaded = {name: load(path, dtype=dtype).eval() for name, path in models.items()}
    weights = {name: sum(tensor.nbytes for tensor in tensors_of(model)) for name, model in loaded.items()}
    for model in loaded.values():
        prepare(model)  # as the engine does
    times = decode_times(loaded, [context], budget.batch, ROUNDS)
    found = {}
    for name, model in loaded.items():
        with torch.device("meta"):  # what would be allocated, without doing it: a long context may be gigabytes
            state = State.for_context(model.config, budget.batch, budget.context, dtype, torch.device("meta")).bytes
        speed = budget.batch / (times[name][0].quickest / 1e3)
        found[name] = {"tokens_per_second": round(speed, 1), "context": context, "weight_bytes": weights[name], "state_bytes": state}
    return found


def tensors_of(model: HybridLM) -> Iterable[Tensor]:
    """Every weight once: parameters, and the codes and scales of what is quantised."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
