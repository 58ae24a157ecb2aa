"""Time of a decode step against the context length, and cache memory of a sequence.

A step runs the executor that the engine chooses: one token for each of `batch` sequences at position `context`. KV cache
and recurrent states are filled with random numbers instead of a prefill, since the time of a step does not
depend on their values. Each step writes to the same position, so the context does not grow.

The speed of a machine drifts, so the models take turns step by step (A B A B ...), and the median counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from nanohybrid.engine.random_weights import repeat
from nanohybrid.estimate import Footprint
from nanohybrid.executors import executor_for
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.ops.sizes import PAGE

WARM_UP = 2
# random numbers, repeated to fill all caches; drawn on the host, so they are the same on every device
NOISE = 65_537


@dataclass(frozen=True)
class DecodeTime:
    """A model at one context length: median and minimum time of a step in ms, and cache bytes of one
    sequence."""

    context: int
    milliseconds: float
    quickest: float
    sequence_bytes: int


class DecodeStep:
    """A model with `batch` sequences at position `context`; calling it does one decode step."""

    def __init__(self, model: HybridLM, context: int, batch: int, seed: int = 0) -> None:
        slots = range(batch)
        self.model = model
        self.state = HybridCache.for_context(model.config, batch, context + 1, model.dtype, model.device)
        self.executor, self.rows = executor_for(model, self.state), range(batch)
        self.layout = Layout.contiguous([1] * batch, [context] * batch, slots, context + 1, PAGE)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(NOISE, generator=generator).mul_(0.5)
        for pools in self.state.layers:
            for pool in pools.values():
                repeat(pool, noise.to(pool.device, pool.dtype))
        self.tokens = torch.randint(model.config.vocab_size, (batch,), generator=generator).to(model.device)

    @torch.inference_mode()
    def __call__(self) -> float:
        """Time of one step in milliseconds, logits included."""
        began = time.perf_counter()
        self.executor.run(self.tokens, self.layout, self.rows)
        if self.tokens.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e3


def decode_times(
    models: Mapping[str, HybridLM],
    contexts: Sequence[int],
    batch: int = 16,
    rounds: int = 9,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> dict[str, list[DecodeTime]]:
    """For each model, one row per context. The caches of all models at one context are in memory at once.

    advance: called with 1 after each context.
    """
    result: dict[str, list[DecodeTime]] = {name: [] for name in models}
    footprints = {name: Footprint.of(model.config, model.dtype) for name, model in models.items()}
    for context in contexts:
        steps = {name: DecodeStep(model, context, batch, seed) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for number in range(WARM_UP + rounds):
            for name, step in steps.items():
                spent = step()
                if number >= WARM_UP:
                    times[name].append(spent)
        for name, spent_each in times.items():
            cache_bytes = footprints[name].sequence_bytes(context)
            result[name].append(
                DecodeTime(context, round(median(spent_each), 3), round(min(spent_each), 3), cache_bytes)
            )
        if advance is not None:
            advance(1)
    return result
