"""Time one model on one workload: random weights, as many sequences as the memory plan allows.

Generating every token of 8k/16k takes an hour at full size, so only parts of a workload are timed: some whole
prompts, one after another, and some decode steps of all sequences, at context lengths around the workload's
mean. The decode steps continue from a synthetic cache, as they would from a cached prompt. The time of a step
grows linearly with the context length, so

    output tokens/s = sequences x output tokens / (sequences x median prompt time + output tokens x median
    step time)

The bandwidth and FLOP rates of the machine are measured before and after each run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from nanohybrid.bench.comparison import Candidate, Workload, max_num_batched_tokens
from nanohybrid.bench.machine import Machine
from nanohybrid.bench.roofline import Planned
from nanohybrid.engine import Engine, SamplingParams
from nanohybrid.engine.random_weights import random_model, repeat, stand_in_tokenizer
from nanohybrid.engine.request import Request
from nanohybrid.estimate.devices import Device
from nanohybrid.executors.cpu.weights import prepare
from nanohybrid.model.cache import HybridCache, OffloadedCache
from nanohybrid.ops.sizes import CHUNK

SAMPLES = 3  # of the machine's rates, before and after each run
# Seconds of prompts, and of decode steps, if both ran at the roofline. At least one prompt and MIN_STEPS
# steps are timed.
SECONDS = 3.0
MIN_STEPS, WARMUP_STEPS = 24, 3


@dataclass(frozen=True)
class Timed:
    """Median seconds of a prompt and of a decode step of all sequences; the machine's bytes/s and FLOP/s."""

    prompt: float
    step: float
    bandwidth: float
    flops: float


@dataclass(frozen=True)
class TimedPart:
    """The timed part of a workload: whole prompts, and decode steps from context length `start` on."""

    prompts: int
    steps: int
    start: int

    @classmethod
    def of(cls, planned: Planned) -> TimedPart:
        """About SECONDS of prompts and of steps at the roofline.

        The steps are centered on the mean context.
        """
        workload = planned.workload
        prompts = min(planned.sequences, max(1, int(SECONDS / planned.prompt)))
        steps = min(workload.output_tokens - 1, max(MIN_STEPS, int(SECONDS / planned.step)))
        return cls(prompts, steps, workload.input_tokens + (workload.output_tokens - steps) // 2)

    def seconds(self, planned: Planned) -> float:
        """Seconds that the part takes at the roofline."""
        return self.prompts * planned.prompt + self.steps * planned.step


class Runner:
    """Loads one candidate with random weights, and times it on any number of workloads."""

    def __init__(self, candidate: Candidate, device: str = "cpu", seed: int = 0) -> None:
        quantized = None if candidate.dtype == "bf16" else candidate.dtype
        self.model = random_model(candidate.config, torch.bfloat16, seed, device, quantized)
        prepare(self.model)
        self.tokenizer = stand_in_tokenizer(candidate.config)

    def time(
        self, planned: Planned, scale: int, advance: Callable[[float], object] = lambda _: None
    ) -> Timed:
        """Time the planned workload.

        advance: called with the share of the work that was done since its last call; the shares add up to 1.
        """
        part, draw = TimedPart.of(planned), random.Random(0)
        whole = part.seconds(planned)
        before = this_machine(self.model.device)
        engine = Engine(
            self.model,
            self.tokenizer,
            max_num_seqs=planned.sequences,
            max_model_len=planned.workload.context,
            max_num_batched_tokens=max_num_batched_tokens(scale),
        )
        self._warm_up(engine, planned.workload, draw)
        prompts = []
        for _ in range(part.prompts):
            prompts.append(self._prompt(engine, planned.workload, draw))
            advance(planned.prompt / whole)
        steps = self._steps(engine, planned, part, draw)
        del engine
        advance(part.steps * planned.step / whole)
        after = this_machine(self.model.device)
        rates = ((before.bandwidth + after.bandwidth) / 2, (before.flops + after.flops) / 2)
        return Timed(median(prompts), median(steps), *rates)

    def _ids(self, draw: random.Random, length: int) -> list[int]:
        return [draw.randrange(self.model.config.vocab_size) for _ in range(length)]

    def _warm_up(self, engine: Engine, workload: Workload, draw: random.Random) -> None:
        """Run a short request, which loads kernels and allocates buffers."""
        short = engine.add(
            self._ids(draw, min(workload.input_tokens, CHUNK)), SamplingParams(max_tokens=2, ignore_eos=True)
        )
        while not short.finished:
            engine.step()

    def _prompt(self, engine: Engine, workload: Workload, draw: random.Random) -> float:
        """Seconds from one prompt to its first token, with no other request running."""
        request = engine.add(
            self._ids(draw, workload.input_tokens),
            SamplingParams(max_tokens=workload.output_tokens, ignore_eos=True),
        )
        began = time.perf_counter()
        while not request.tokens:
            engine.step()
        seconds = time.perf_counter() - began
        engine.cancel(request)
        return seconds

    def _steps(self, engine: Engine, planned: Planned, part: TimedPart, draw: random.Random) -> list[float]:
        """Seconds of each decode step of all sequences, without the first WARMUP_STEPS if more were run."""
        cache = engine.runner.state
        synthesize_cache(cache)

        def resume(request: Request) -> None:
            """Restore slot 0's state as a prefix-cache hit does: only the last token is computed."""
            request.num_computed_tokens, request.offloaded = (
                len(request.prompt) - 1,
                OffloadedCache([pool[0] for pool in cache.slot_pools], ()),
            )

        engine.scheduler.on_admit = resume
        params = SamplingParams(max_tokens=planned.workload.context - part.start, ignore_eos=True)
        requests = [engine.add(self._ids(draw, part.start), params) for _ in range(planned.sequences)]
        times = []
        for _ in range(part.steps):
            began = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - began)
        for request in requests:
            engine.cancel(request)
        return times[WARMUP_STEPS:] or times


def synthesize_cache(cache: HybridCache) -> None:
    """Fill keys, values and states with noise, in place.

    Memory that was never written is one shared page of zeros, which the CPU's cache holds; reading it would
    be too fast.
    """
    noise = torch.randn(65_537, generator=torch.Generator().manual_seed(0))
    for pool in (*cache.slot_pools, *cache.page_pools):
        repeat(pool, noise.to(pool.device, pool.dtype))


def this_machine(device: str | torch.device = "cpu") -> Device:
    """The current bandwidth (bytes/s) and bf16 matmul rate (FLOP/s) of this machine, as a roofline device."""
    return Device("this machine", 0, *Machine(device).rates(SAMPLES, median))
