"""Parent and result at work where the stage ran: tokens a second of a decode step, and the bytes that they really hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint import CheckpointReader, load, load_config
from nanohybrid.config import HybridConfig
from nanohybrid.estimate.budget import Budget
from nanohybrid.estimate.free_memory import free_bytes
from nanohybrid.evaluate.throughput import decode_times
from nanohybrid.executors.cpu.weights import prepare
from nanohybrid.model import HybridCache, HybridLM
from nanohybrid.prune.streaming import BESIDE

LONGEST = 4096  # tokens of context at which a step is timed, at most: a stage must not take minutes to say how fast it became
ROUNDS = 7


def at_work(models: Mapping[str, Path], budget: Budget, device: str = "cpu") -> dict[str, dict[str, float]]:
    """By name: tokens a second of all sequences together, and bytes as they are allocated at the whole context.

    Of a few steps, in turns, the quickest counts. Models that have no room beside each other are timed one after the other, and one that
    has no room at all is not: its row then lacks `tokens_per_second`.
    """
    need, free = sum(held_bytes(path, budget) for path in models.values()) + BESIDE, free_bytes(device)
    if free is not None and need > free:
        if len(models) == 1:
            return {name: untimed(path, budget) for name, path in models.items()}
        return {name: at_work({name: path}, budget, device)[name] for name, path in models.items()}
    dtype, context = budget.kind, min(budget.context, LONGEST)
    loaded = {name: load(path, dtype, device).eval() for name, path in models.items()}
    weights = {name: sum(tensor.nbytes for tensor in tensors_of(model)) for name, model in loaded.items()}
    for model in loaded.values():
        prepare(model)  # as the engine does
    times = decode_times(loaded, [context], budget.batch, ROUNDS)
    found = {}
    for name, model in loaded.items():
        speed = budget.batch / (times[name][0].quickest / 1e3)
        state = state_bytes(model.config, budget)
        found[name] = {
            "tokens_per_second": round(speed, 1),
            "context": context,
            "weight_bytes": weights[name],
            "state_bytes": state,
        }
    return found


def untimed(path: Path, budget: Budget) -> dict[str, float]:
    """The bytes alone, of a model that is not loaded."""
    context = min(budget.context, LONGEST)
    return {
        "context": context,
        "weight_bytes": held_bytes(path, budget),
        "state_bytes": state_bytes(load_config(path), budget),
    }


def held_bytes(path: Path, budget: Budget) -> int:
    """Of the weights of a checkpoint as they would be loaded."""
    with CheckpointReader(path) as reader:
        return reader.weight_bytes(budget.kind)


def state_bytes(config: HybridConfig, budget: Budget) -> int:
    """Of keys, values and states as they would be allocated, without doing it: a long context may be gigabytes."""
    meta = torch.device("meta")
    with meta:
        return HybridCache.for_context(config, budget.batch, budget.context, budget.kind, meta).bytes


def tensors_of(model: HybridLM) -> Iterable[Tensor]:
    """Every weight once: parameters, and the codes and scales of what is quantized."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
