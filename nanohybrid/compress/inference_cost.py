"""Base model and result at inference on this machine: tokens a second of a decode step, and the bytes that
they allocate."""

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
from nanohybrid.prune.streaming import WORKSPACE_BYTES

MAX_CONTEXT = 4096
"""Tokens of context at which a step is timed, at most, so that timing takes seconds."""
ROUNDS = 7


def measure_inference(
    models: Mapping[str, Path], budget: Budget, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """For each checkpoint by name: tokens a second of all sequences together, and the bytes that are
    allocated.

    The quickest of a few steps counts; the models take turns. Models that do not fit the memory together are
    timed one after the other. One that does not fit alone is not timed: its row has no `tokens_per_second`.
    """
    need = sum(weight_bytes(path, budget) for path in models.values()) + WORKSPACE_BYTES
    free = free_bytes(device)
    if free is not None and need > free:
        if len(models) == 1:
            return {name: bytes_alone(path, budget) for name, path in models.items()}
        return {name: measure_inference({name: path}, budget, device)[name] for name, path in models.items()}
    dtype, context = budget.kind, min(budget.context, MAX_CONTEXT)
    loaded = {name: load(path, dtype, device).eval() for name, path in models.items()}
    weights = {name: sum(tensor.nbytes for tensor in tensors_of(model)) for name, model in loaded.items()}
    for model in loaded.values():
        prepare(model)  # as the engine does
    times = decode_times(loaded, [context], budget.batch, ROUNDS)
    found = {}
    for name, model in loaded.items():
        speed = budget.batch / (times[name][0].quickest / 1e3)
        found[name] = {
            "tokens_per_second": round(speed, 1),
            "context": context,
            "weight_bytes": weights[name],
            "state_bytes": state_bytes(model.config, budget),
        }
    return found


def bytes_alone(path: Path, budget: Budget) -> dict[str, float]:
    """The bytes of a checkpoint that is not loaded."""
    return {
        "context": min(budget.context, MAX_CONTEXT),
        "weight_bytes": weight_bytes(path, budget),
        "state_bytes": state_bytes(load_config(path), budget),
    }


def weight_bytes(path: Path, budget: Budget) -> int:
    """Bytes of the weights of a checkpoint as they would be loaded."""
    with CheckpointReader(path) as reader:
        return reader.weight_bytes(budget.kind)


def state_bytes(config: HybridConfig, budget: Budget) -> int:
    """Bytes of KV cache and recurrent states as they would be allocated for the whole context; nothing is
    allocated."""
    meta = torch.device("meta")
    with meta:
        return HybridCache.for_context(config, budget.batch, budget.context, budget.kind, meta).bytes


def tensors_of(model: HybridLM) -> Iterable[Tensor]:
    """Every weight once: parameters, and the codes and scales of what is quantized."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
