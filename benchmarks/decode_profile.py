"""Where the time of a decode step on a CPU goes: Python, waking the threads, each phase of the kernel; each
with its roofline.

    python benchmarks/decode_profile.py --preset nano-291m --dtype bf16 int8 int4
    python benchmarks/decode_profile.py --dtype int8 --json

The kernel's phases are timed by executors/cpu/kernels/profiler.py; the numbers are means over threads and
medians over steps. Python's parts are timed around the engine's functions, each without what it calls.
`roofline`: the phase's bytes at the rate at which this machine summed 512 MiB just before and after the same
steps. All numbers come from one run, so that on a shared machine the parts belong together.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from nanohybrid.bench.generate import Job, step_bytes
from nanohybrid.bench.machine import Machine
from nanohybrid.engine import LLM, Engine, SamplingParams
from nanohybrid.executors.cpu.forward import CpuExecutor
from nanohybrid.executors.cpu.kernels import profiler
from nanohybrid.ops.numba import threads
from nanohybrid.presets import preset

RATE_SAMPLES = 5


class Stopwatch:
    """Seconds by name, each without the time of nested calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as `name`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                took = time.perf_counter() - began
                self.seconds[name] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return timed


def phase_bytes(executor: CpuExecutor, context: int, batch: int) -> dict[str, int]:
    """Bytes that each phase of a step reads and writes: weights once, states in and out, keys and values
    in.
    """
    config = executor.config
    counts: dict[str, int] = defaultdict(int)
    names = {
        "M": ("Mamba-2 in", "Mamba-2 out"),
        "*": (*["queries, keys, values"] * 3, "attention out"),
        "-": ("MLP up", "MLP down"),
    }
    if config.mlp_activation == "swiglu":
        names["-"] = ("MLP up", "MLP up", "MLP down")
    counts["head"] = 0 if executor.head is None else executor.head.data.numel()
    weights = iter(executor.weights)
    for kind in config.pattern:
        for name in names[kind]:
            counts[name] += next(weights).data.numel()
    channels = config.mamba_inner_size + 2 * config.n_groups * config.ssm_state_size
    state = config.mamba_inner_size * config.ssm_state_size * 4 + (config.conv_kernel - 1) * channels * 2
    counts["conv and recurrence"] = executor.recurrent_layers * 2 * state * batch
    counts["attention"] = (
        config.pattern.count("*") * 2 * config.num_key_value_heads * config.head_dim * 2 * context * batch
    )
    return counts


def profile(llm: LLM, prompt_tokens: int, steps: int, batch: int) -> dict[str, Any]:
    """Milliseconds of a step by part, as rows of (part, MB, roofline ms, ms)."""
    draw = random.Random(0)
    prompts = [
        [draw.randrange(llm.model.config.vocab_size) for _ in range(prompt_tokens)] for _ in range(batch)
    ]
    engine = llm.engine(prompts, steps + 8)
    for prompt in prompts:
        engine.add(prompt, SamplingParams(max_tokens=steps + 8, ignore_eos=True))
    for _ in range(6):  # prompts, and steps that warm up
        engine.step()
    executor = engine.runner.executor
    if not isinstance(executor, CpuExecutor):
        raise SystemExit("this model does not run on the CPU executor here: there is nothing to profile")
    machine = Machine("cpu")
    before, _ = machine.rates(RATE_SAMPLES, median)
    rows, whole = measured(engine, executor, steps)
    after, _ = machine.rates(RATE_SAMPLES, median)
    stream = (before + after) / 2
    counts = phase_bytes(executor, prompt_tokens + steps // 2, batch)
    moved = step_bytes(llm, Job(prompt_tokens, steps, batch))
    table = [
        (name, counts.get(name, 0) / 1e6, 1e3 * counts.get(name, 0) / stream, ms) for name, ms in rows.items()
    ]
    return {
        "stream_gb_per_second": stream / 1e9,
        "step_ms": whole,
        "roofline_ms": 1e3 * moved / stream,
        "step_bytes": moved,
        "parts": table,
    }


def measured(engine: Engine, executor: CpuExecutor, steps: int) -> tuple[dict[str, float], float]:
    """Median milliseconds of each part, and of a whole step."""
    watch = Stopwatch()
    for owner, attribute, name in (
        (engine, "_schedule", "schedule"),
        (engine, "_postprocess", "postprocess"),
        (engine.runner, "_layout", "layout"),
        (engine.runner, "_sample_async", "sampling"),
        (engine.runner, "run", "runner"),
        (engine.runner.executor, "run", "arguments"),
    ):
        setattr(owner, attribute, watch.around(name, getattr(owner, attribute)))
    pool_run = threads.ThreadPool.run
    threads.ThreadPool.run = watch.around("forward", pool_run)  # type: ignore[method-assign]
    step = watch.around("loop", engine.step)
    executor.profile = counters = profiler.make_counters(torch.get_num_threads())
    each: dict[str, list[float]] = defaultdict(list)
    pace = ticks_per_second()
    try:
        for _ in range(steps):
            watch.seconds.clear()
            counters[:] = 0
            step()
            each["whole"].append(sum(watch.seconds.values()))
            inside = counters[:, 1 : 1 + len(profiler.PHASES)] / pace
            waking = watch.seconds.pop("forward") - inside[0].sum() + inside[0, profiler.WAKE]
            phases = dict(zip(profiler.PHASES, inside.mean(0), strict=True)) | {"wake": waking}
            for name, took in (phases | watch.seconds).items():
                each[name].append(took)
    finally:
        threads.ThreadPool.run, executor.profile = pool_run, None  # type: ignore[method-assign]
    whole = median(each.pop("whole"))
    return {name: 1e3 * median(values) for name, values in each.items()}, 1e3 * whole


def ticks_per_second() -> float:
    """The rate of the counter that the profiler reads."""
    ticked = np.zeros(2, dtype=np.int64)
    threads.run(profiler.read_counter, ticked[1:], size=1)  # compiled now, not between the two
    began = time.perf_counter()
    threads.run(profiler.read_counter, ticked[:1], size=1)
    time.sleep(0.2)
    threads.run(profiler.read_counter, ticked[1:], size=1)
    return float(ticked[1] - ticked[0]) / (time.perf_counter() - began)


def as_table(dtype: str, found: dict[str, Any]) -> str:
    """A markdown table of one profile."""
    step, roofline = found["step_ms"], found["roofline_ms"]
    lines = [
        f"{dtype}: a step takes {step:.2f} ms; {found['step_bytes'] / 1e6:.0f} MB at"
        f" {found['stream_gb_per_second']:.1f} GB/s take {roofline:.2f} ms: {100 * roofline / step:.0f} %",
        "",
        "| part | MB | roofline, ms | ms | share of the step |",
        "|---|---|---|---|---|",
    ]
    for name, megabytes, least, ms in found["parts"]:
        moved = f"{megabytes:.1f} | {least:.3f}" if megabytes else " | "
        lines.append(f"| {name} | {moved} | {ms:.3f} | {100 * ms / step:.1f} % |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="nano-291m")
    parser.add_argument(
        "--dtype", nargs="+", choices=("bf16", "int8", "int4"), default=["bf16", "int8", "int4"]
    )
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = {}
    for dtype in arguments.dtype:
        quantize = None if dtype == "bf16" else dtype
        llm = LLM.random(preset(arguments.preset), torch.bfloat16, quantize=quantize)
        results[dtype] = profile(llm, arguments.prompt_tokens, arguments.steps, arguments.batch)
        if not arguments.json:
            print(as_table(dtype, results[dtype]), end="\n\n", flush=True)
    if arguments.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
