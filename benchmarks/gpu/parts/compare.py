"""The workloads of `nanohybrid bench compare` through the engine: the 9B and Qwen3-8B in 22 GiB each (true
shapes, random weights, bf16).

The batch is as many sequences as fit at full length, by the engine's own plan. Generating every token would
take an hour. So the engine computes prompts as long as the mean context, then a few dozen decode steps. Both
are timed:

    tokens/s = batch * out / (time of the prompts * in / mean context + out * median step)

The formula is exact where the time of a step is linear in the context, and that of prefill in the prompt.
"""

import random
import time
from collections.abc import Callable
from statistics import median

import torch
from bench import Bench, wait

from nanohybrid.config import HybridConfig
from nanohybrid.engine import Engine, SamplingParams
from nanohybrid.engine.random_weights import random_model, stand_in_tokenizer
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.serving import PROCESS, ServePlan, plan_serve
from nanohybrid.estimate.units import GIB
from nanohybrid.model import HybridLM
from nanohybrid.presets import preset
from nanohybrid.text import Tokenizer

TITLE = "Output tokens per second in 22 GiB, and the fraction of the roofline of a decode step."
WORKLOADS = ((1024, 1024), (8192, 1024), (8192, 16_384), (131_072, 1024))
MODELS = ("nano-9b-v2", "qwen3-8b")
MEMORY_LIMIT, STEPS = 22 * GIB, 24


def run(bench: Bench, emit: Callable[[dict], None]) -> None:
    dtype = torch.float32 if bench.toy else torch.bfloat16
    if bench.device.type == "cuda":  # the allocator refuses more; CUDA's own context is the rest of the limit
        torch.cuda.set_per_process_memory_fraction(
            (MEMORY_LIMIT - PROCESS) / torch.cuda.get_device_properties(bench.device).total_memory
        )
    for name in ("tiny", "tiny-dense") if bench.toy else MODELS:
        config = preset(name)
        model = random_model(config, dtype, device=str(bench.device))
        tokenizer = stand_in_tokenizer(config)
        for prompt_tokens, new_tokens in ((30, 10),) if bench.toy else WORKLOADS:
            row = {"model": name, "in": prompt_tokens, "out": new_tokens}
            try:
                emit(row | measured(bench, model, tokenizer, prompt_tokens, new_tokens))
            except (InputError, torch.OutOfMemoryError) as error:
                emit(
                    row
                    | {
                        "batch": 0,
                        "problem": "does not fit" if isinstance(error, InputError) else "out of memory",
                    }
                )
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
        del model


def measured(
    bench: Bench, model: HybridLM, tokenizer: Tokenizer, prompt_tokens: int, new_tokens: int
) -> dict:
    """One workload on one model. Raises InputError where not even one sequence fits."""
    config, dtype, mean = model.config, model.dtype, prompt_tokens + new_tokens // 2
    plan = plan_serve(
        config,
        Footprint.of(config, dtype),
        MEMORY_LIMIT,
        prompt_tokens + new_tokens,
        max_running=2 if bench.toy else None,
    )
    engine = Engine(
        model,
        tokenizer,
        max_num_seqs=plan.slots,
        max_model_len=plan.context,
        max_num_batched_tokens=plan.step_tokens,
        num_kv_pages=plan.pages,
    )
    prompts, step = timed(engine, plan.slots, mean, 3 if bench.toy else STEPS, bench.device)
    whole = prompts * prompt_tokens / mean + new_tokens * step
    roofline, _ = bench.roofline(step_bytes(config, plan, mean, dtype))
    row = {
        "batch": plan.slots,
        "step_ms": 1e3 * step,
        "roofline_ms": roofline,
        "fraction": roofline / (1e3 * step),
    }
    return row | {
        "prefill_tokens/s": plan.slots * mean / prompts,
        "tokens/s": plan.slots * new_tokens / whole,
    }


def timed(engine: Engine, batch: int, context: int, steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds of all prompts of `context` tokens, and of a decode step of all sequences."""
    rng = random.Random(0)
    params = SamplingParams(
        max_tokens=engine.scheduler.max_model_len - context, ignore_eos=True
    )  # the first sequences decode while others start
    vocabulary = engine.model.config.vocab_size
    requests = [engine.add([rng.randrange(vocabulary) for _ in range(context)], params) for _ in range(batch)]
    began = time.perf_counter()
    while not all(request.tokens for request in requests):
        engine.step()
    wait(device)
    prompts = time.perf_counter() - began
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        wait(device)
        times.append(time.perf_counter() - began)
    for request in requests:
        engine.cancel(request)
    return prompts, median(times)


def step_bytes(config: HybridConfig, plan: ServePlan, context: int, dtype: torch.dtype) -> float:
    """Bytes of a decode step: weights but the embedding table, states twice, keys and values."""
    footprint = Footprint.of(config, dtype)
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * dtype.itemsize
    each = 2 * footprint.state_bytes_per_sequence + context * footprint.kv_bytes_per_token
    return footprint.weight_bytes - table + plan.slots * each
