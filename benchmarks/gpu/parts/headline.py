"""The headline mixes through the engine: the 9B and Qwen3-8B (true shapes, random weights, bf16) in 22 GiB
each.

As many sequences as fit at their full length, by the engine's own plan. Generating every token would take an
hour; so the engine computes prompts as long as the mean context, which is timed, and then a few dozen steps
of decoding, which are timed too:

    tokens/s = batch * out / (time of the prompts * in / mean context + out * median step)

which is exact where a step's time grows in proportion to the context, and prefill's with the prompt.
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

TITLE = "Output tokens per second in 22 GiB, and the fraction of what the bytes of a step allow."
MIXES = ((1024, 1024), (8192, 1024), (8192, 16_384), (131_072, 1024))
MODELS = ("nano-9b-v2", "qwen3-8b")
CAP, STEPS = 22 * GIB, 24


def run(bench: Bench, emit: Callable[[dict], None]) -> None:
    dtype = torch.float32 if bench.toy else torch.bfloat16
    if bench.device.type == "cuda":  # the allocator refuses more; CUDA's own context is the rest of the cap
        torch.cuda.set_per_process_memory_fraction(
            (CAP - PROCESS) / torch.cuda.get_device_properties(bench.device).total_memory
        )
    for name in ("tiny", "tiny-dense") if bench.toy else MODELS:
        config = preset(name)
        model = random_model(config, dtype, device=str(bench.device))
        tokenizer = stand_in_tokenizer(config)
        for taken, made in ((30, 10),) if bench.toy else MIXES:
            row = {"model": name, "in": taken, "out": made}
            try:
                emit(row | measured(bench, model, tokenizer, taken, made))
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


def measured(bench: Bench, model: HybridLM, tokenizer: Tokenizer, taken: int, made: int) -> dict:
    """One mix on one model. Raises InputError where not even one sequence fits."""
    config, dtype, mean = model.config, model.dtype, taken + made // 2
    plan = plan_serve(
        config, Footprint.of(config, dtype), CAP, taken + made, max_running=2 if bench.toy else None
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
    whole = prompts * taken / mean + made * step
    floor, _ = bench.floor(step_bytes(config, plan, mean, dtype))
    row = {"batch": plan.slots, "step_ms": 1e3 * step, "floor_ms": floor, "fraction": floor / (1e3 * step)}
    return row | {"prefill_tokens/s": plan.slots * mean / prompts, "tokens/s": plan.slots * made / whole}


def timed(engine: Engine, batch: int, context: int, steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds for all prompts of `context` tokens, and of a decoding step of all of them."""
    rng = random.Random(0)
    params = SamplingParams(
        max_tokens=engine.scheduler.max_model_len - context, ignore_eos=True
    )  # the first decode while others begin
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
    """Weights but the embedding table, each state read and written, keys and values of the context."""
    footprint = Footprint.of(config, dtype)
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * dtype.itemsize
    each = 2 * footprint.state_bytes_per_sequence + context * footprint.kv_bytes_per_token
    return footprint.weight_bytes - table + plan.slots * each
