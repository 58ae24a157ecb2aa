"""The contest run: one engine, random weights, as many sequences as the plan says, and the rates of the machine around each.

To write every token of 8k/16k takes an hour at true shapes. So what is timed is a few whole prompts, one after another, and then a
window of decode steps of all sequences at once about the mix's mean length, where they go on from made-up keys, values and states as
they would from a cached prompt. A step's time grows in proportion to the length, so that

    output tokens per second = sequences x outputs / (sequences x median prompt + outputs x median step)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from nanohybrid.bench.comparison import Contender, Mix, step_tokens
from nanohybrid.bench.machine import Machine
from nanohybrid.bench.roofline import Planned
from nanohybrid.engine import Engine, SamplingParams
from nanohybrid.engine.random_weights import random_model, repeat, stand_in_tokenizer
from nanohybrid.engine.request import Request
from nanohybrid.estimate.devices import Device
from nanohybrid.executors.cpu.weights import prepare
from nanohybrid.model.cache import HybridCache, OffloadedCache
from nanohybrid.ops.sizes import CHUNK

LOOKS = 3  # at the machine, before and after each contender
SECONDS = 3.0  # of prompts, and again of steps, at the roofline's pace; one prompt and STEPS steps at least
STEPS, WARM = 24, 3


@dataclass(frozen=True)
class Timed:
    """Seconds of one prompt and of one decode step of all sequences, medians, and the machine's rates around them."""

    prompt: float
    step: float
    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Extent:
    """How much of a job is timed: so many whole prompts, and so many steps from length `start` on."""

    prompts: int
    steps: int
    start: int

    @classmethod
    def of(cls, planned: Planned) -> Extent:
        """What takes about SECONDS each at best; the steps lie about the mix's mean length."""
        mix = planned.mix
        prompts = min(planned.sequences, max(1, int(SECONDS / planned.prompt)))
        steps = min(mix.outputs - 1, max(STEPS, int(SECONDS / planned.step)))
        return cls(prompts, steps, mix.inputs + (mix.outputs - steps) // 2)

    def seconds(self, planned: Planned) -> float:
        """What it takes at best."""
        return self.prompts * planned.prompt + self.steps * planned.step


class Runner:
    """One contender's model, kept between mixes."""

    def __init__(self, contender: Contender, device: str = "cpu", seed: int = 0) -> None:
        quantized = None if contender.dtype == "bf16" else contender.dtype
        self.model = random_model(contender.config, torch.bfloat16, seed, device, quantized)
        prepare(self.model)
        self.tokenizer = stand_in_tokenizer(contender.config)

    def time(
        self, planned: Planned, scale: int, advance: Callable[[float], object] = lambda _: None
    ) -> Timed:
        """Time it at its mix; `advance` is told what part of the work is done since it was last told, 1 in all."""
        extent, draw = Extent.of(planned), random.Random(0)
        whole = extent.seconds(planned)
        before = this_machine(self.model.device)
        engine = Engine(
            self.model,
            self.tokenizer,
            max_num_seqs=planned.sequences,
            max_model_len=planned.mix.context,
            max_num_batched_tokens=step_tokens(scale),
        )
        self._warm_up(engine, planned.mix, draw)
        prompts = []
        for _ in range(extent.prompts):
            prompts.append(self._prompt(engine, planned.mix, draw))
            advance(planned.prompt / whole)
        steps = self._steps(engine, planned, extent, draw)
        del engine
        advance(extent.steps * planned.step / whole)
        after = this_machine(self.model.device)
        rates = ((before.bandwidth + after.bandwidth) / 2, (before.flops + after.flops) / 2)
        return Timed(median(prompts), median(steps), *rates)

    def _ids(self, draw: random.Random, length: int) -> list[int]:
        return [draw.randrange(self.model.config.vocab_size) for _ in range(length)]

    def _warm_up(self, engine: Engine, mix: Mix, draw: random.Random) -> None:
        """Have kernels loaded and buffers made."""
        short = engine.add(
            self._ids(draw, min(mix.inputs, CHUNK)), SamplingParams(max_tokens=2, ignore_eos=True)
        )
        while not short.finished:
            engine.step()

    def _prompt(self, engine: Engine, mix: Mix, draw: random.Random) -> float:
        """Seconds of one prompt to its first token, by itself."""
        request = engine.add(
            self._ids(draw, mix.inputs), SamplingParams(max_tokens=mix.outputs, ignore_eos=True)
        )
        began = time.perf_counter()
        while not request.tokens:
            engine.step()
        seconds = time.perf_counter() - began
        engine.cancel(request)
        return seconds

    def _steps(self, engine: Engine, planned: Planned, extent: Extent, draw: random.Random) -> list[float]:
        """Seconds of each step of all sequences, the first few left out where there are enough."""
        state = engine.runner.state
        invent(state)

        def go_on(request: Request) -> None:
            """As the prefix cache would: all but the last token has been computed, and this is what it left."""
            request.num_computed_tokens, request.offloaded = (
                len(request.prompt) - 1,
                OffloadedCache([pool[0] for pool in state.slot_pools], ()),
            )

        engine.scheduler.on_admit = go_on
        params = SamplingParams(max_tokens=planned.mix.context - extent.start, ignore_eos=True)
        requests = [engine.add(self._ids(draw, extent.start), params) for _ in range(planned.sequences)]
        times = []
        for _ in range(extent.steps):
            began = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - began)
        for request in requests:
            engine.cancel(request)
        return times[WARM:] or times


def invent(state: HybridCache) -> None:
    """Fill keys, values and states with noise, in memory that is really there: pages never written are all one page of zeros, which
    a cache holds."""
    noise = torch.randn(65_537, generator=torch.Generator().manual_seed(0))
    for pool in (*state.slot_pools, *state.page_pools):
        repeat(pool, noise.to(pool.device, pool.dtype))


def this_machine(device: str | torch.device = "cpu") -> Device:
    """Its rates as a roofline wants them, in this moment; nothing is kept for it."""
    return Device("this machine", 0, *Machine(device).rates(LOOKS, median))
