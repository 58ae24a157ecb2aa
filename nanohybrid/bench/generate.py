"""Measure prefill and decode of one model, and what share of the machine's peak rates they reach.

    prefill      from the first request to the first token of the last sequence
    decode       the steps after that, one token of each sequence per step step bytes   all weights but the
    embedding table (which is looked up), states read and written, KV cache read

The peak rates (machine.py) are measured between the repetitions, since the speed of a shared machine drifts.
Each repetition is compared with the rates just before and just after it; the median of these fractions is
reported.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median

import torch

from nanohybrid.bench.machine import Machine
from nanohybrid.bench.roofline import prefill_flops
from nanohybrid.engine import LLM, Engine, SamplingParams
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint
from nanohybrid.executors.cpu.weights import PackedLinear, is_packed
from nanohybrid.model.quantized import QuantizedLinear
from nanohybrid.ops.sizes import PAGE
from nanohybrid.stages.lineage import peak_memory_bytes

REPEATS = 5
WARM_TOKENS = 4096
SAMPLES = 3  # of the peak rates, between repetitions


@dataclass(frozen=True)
class Job:
    """`batch` prompts of random token ids and `new_tokens` output tokens each, measured `repeats` times."""

    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int = REPEATS

    def check(self, context: int) -> None:
        """Raise InputError if a count is too small, or the tokens exceed the model's `context`."""
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("batch", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}"
                )
        if self.prompt_tokens + self.new_tokens > context:
            raise InputError(
                f"{self.prompt_tokens} + {self.new_tokens} tokens exceed the model's context of {context}; "
                "lower --prompt-tokens or --new-tokens"
            )


def measure(llm: LLM, job: Job, advance: Callable[[], object] = lambda: None) -> dict[str, object]:
    """The figures of `nanohybrid bench generate`, as JSON values.

    advance: called after each of the job.repeats + 1 runs. The first run warms up. It reads only the first
        PAGE tokens of prompts longer than WARM_TOKENS, since a full prompt takes as long as a measured run.

    Raises InputError for an impossible job (`Job.check`).
    """
    config = llm.model.config
    job.check(config.max_position_embeddings)
    draw = random.Random(0)
    prompts = [
        [draw.randrange(config.vocab_size) for _ in range(job.prompt_tokens)] for _ in range(job.batch)
    ]
    engine = llm.engine(prompts, job.new_tokens)
    moved, computed = step_bytes(llm, job), job.batch * prefill_flops(config, job.prompt_tokens)
    machine = Machine(llm.model.device)
    rates: list[tuple[float, float]] = [machine.rates(SAMPLES, median)]
    times: list[tuple[float, float]] = []
    for repeat in range(job.repeats + 1):
        short = repeat == 0 and job.prompt_tokens > WARM_TOKENS
        times.append(
            _once(engine, [prompt[:PAGE] for prompt in prompts] if short else prompts, job.new_tokens)
        )
        rates.append(machine.rates(SAMPLES, median))
        advance()
    around = [tuple(map(mean, zip(before, after, strict=True))) for before, after in pairwise(rates)]
    runs = list(zip(times, around, strict=True))[1:]  # the first warms up
    steps = job.new_tokens - 1
    return {
        "prefill_tokens_per_second": _spread(
            [job.batch * job.prompt_tokens / first for (first, _), _ in runs]
        ),
        "decode_tokens_per_second": _spread([job.batch * steps / rest for (_, rest), _ in runs]),
        "stream_gb_per_second": median(stream for _, (stream, _) in runs) / 1e9,
        "matmul_gflops": median(product for _, (_, product) in runs) / 1e9,
        "decode_bandwidth_fraction": median(moved * steps / rest / stream for (_, rest), (stream, _) in runs),
        "prefill_matmul_fraction": median(computed / first / product for (first, _), (_, product) in runs),
        "step_bytes": moved,
        "prompt_tokens": job.prompt_tokens, "new_tokens": job.new_tokens, "batch": job.batch,
        "repeats": job.repeats,
        "threads": torch.get_num_threads(),
        "kernels": "compiled" if is_packed(llm.model) else "torch",
        "peak_memory_bytes": peak_memory_bytes(),
    }  # fmt: skip


def step_bytes(llm: LLM, job: Job) -> int:
    """Bytes that a decode step reads and writes at the mean context length of the job."""
    model, config = llm.model, llm.model.config
    formats = {
        module.format for module in model.modules() if isinstance(module, (PackedLinear, QuantizedLinear))
    } - {"bf16"}
    head = None if config.tie_word_embeddings else model.lm_head
    quantized_head = getattr(head, "format", "bf16") != "bf16"
    format = next(iter(formats), None)
    footprint = Footprint.of(config, model.dtype, format=format, quantize_head=quantized_head)
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * model.dtype.itemsize
    cached = (job.prompt_tokens + job.new_tokens // 2) * footprint.kv_bytes_per_token
    return footprint.weight_bytes - table + job.batch * (2 * footprint.state_bytes_per_sequence + cached)


def _once(engine: Engine, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Seconds until every sequence has its first token, and from then until all tokens are written."""
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in prompts]
    began = time.perf_counter()
    while not all(request.tokens for request in requests):
        engine.step()
    begun, had = time.perf_counter(), sum(len(request.tokens) for request in requests)
    while engine.busy:
        engine.step()
    written = sum(len(request.tokens) for request in requests) - had
    # some sequences already have more than one token; the decode time is scaled up to all decode steps
    return begun - began, (time.perf_counter() - begun) * len(prompts) * (new_tokens - 1) / max(written, 1)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}
