"""Tokens per second of a training step on packed documents, relative to the machine's rate of products, and
its peak memory.

python benchmarks/train_step.py --preset tiny --mode bf16 --threads 2 --batch-tokens 2048 python
benchmarks/train_step.py --preset nano-291m --documents 200 1000 --steps 3 --profile python
benchmarks/train_step.py --against torch        # by turns with another form of the ops, same model and run

The rate of products is measured after every step, since on a shared machine only the fraction is reliable.
"""

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import time

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `import nanohybrid` does before torch

import torch
from torch.profiler import ProfilerActivity, profile
from train_profile import product_flops, rows

from nanohybrid.bench.machine import Machine
from nanohybrid.data import Batch
from nanohybrid.model import HybridLM
from nanohybrid.presets import preset
from nanohybrid.train.allocator import keep_freed_memory
from nanohybrid.train.next_token import next_token_loss
from nanohybrid.train.optimizer import OptimizerConfig, adamw, clip_grad_norm
from nanohybrid.train.precision import autocast

PHASES = ("forward", "backward", "update")


def batch(tokens: int, vocabulary: int, rng: random.Random, lengths: tuple[int, int] = (20, 120)) -> Batch:
    """Random documents end to end; every token is a target."""
    documents, count = [], 0
    while count < tokens:
        length = rng.randint(*lengths)
        documents.append(([rng.randrange(vocabulary) for _ in range(length)], [1] * length))
        count += length
    return Batch.of(documents)


def one_step(model: HybridLM, optimizer: torch.optim.Optimizer, data: Batch, mode: str) -> list[float]:
    """Seconds of forward, backward and update."""
    optimizer.zero_grad()
    times = [time.perf_counter()]
    with autocast(mode, torch.device("cpu")):
        total, count = next_token_loss(model, data)
    times.append(time.perf_counter())
    (total / count).backward()
    times.append(time.perf_counter())
    clip_grad_norm(model, 1.0)
    optimizer.step()
    times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)]


def summary(model: HybridLM, measured: list[tuple[int, list[float], float]]) -> dict[str, float]:
    """Medians over steps of (tokens, seconds by phase, product rate): milliseconds, tokens and FLOPs a
    second, fraction.
    """
    seconds = [sum(parts) for _, parts, _ in measured]
    rates = [
        product_flops(model, tokens) / took for (tokens, _, _), took in zip(measured, seconds, strict=True)
    ]
    result = {
        f"{name}_ms": 1e3 * statistics.median(parts[i] for _, parts, _ in measured)
        for i, name in enumerate(PHASES)
    }
    result["tokens_per_second"] = statistics.median(
        tokens / took for (tokens, _, _), took in zip(measured, seconds, strict=True)
    )
    result["product_gflops"] = statistics.median(rates) / 1e9
    result["machine_gflops"] = statistics.median(rate for _, _, rate in measured) / 1e9
    result["fraction"] = statistics.median(
        rate / machine for rate, (_, _, machine) in zip(rates, measured, strict=True)
    )
    return {name: round(value, 3 if name == "fraction" else 1) for name, value in result.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--mode", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--documents", type=int, nargs=2, default=(20, 120), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument(
        "--against", choices=("torch", "reference"), help="a second form of the ops, measured by turns"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="profile one more step, as a table of parts with their rooflines",
    )
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    keep_freed_memory()
    torch.set_num_threads(chosen.threads)
    model, machine = HybridLM(preset(chosen.preset), seed=0), Machine("cpu")
    optimizer, rng = adamw(model, OptimizerConfig()), random.Random(0)
    forms = [os.environ.get("NANOHYBRID_KERNELS", ""), *([chosen.against] if chosen.against else [])]
    measured: dict[str, list[tuple[int, list[float], float]]] = {form: [] for form in forms}
    for step in range(chosen.steps + chosen.warmup):
        for form in forms:
            os.environ["NANOHYBRID_KERNELS"] = form
            data = batch(chosen.batch_tokens, model.config.vocab_size, rng, tuple(chosen.documents))
            seconds = one_step(model, optimizer, data, chosen.mode)
            stream, product = machine.rates(2, min)
            if step >= chosen.warmup:
                measured[form].append((data.layout.tokens, seconds, product))
    run = {
        "preset": chosen.preset,
        "mode": chosen.mode,
        "threads": chosen.threads,
        "batch_tokens": chosen.batch_tokens,
    }
    for form, found in measured.items():
        print(
            json.dumps(
                {**run, "torch": torch.__version__, "form": form or "default", **summary(model, found)}
            ),
            flush=True,
        )
    print(json.dumps({"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}))
    if chosen.profile:
        os.environ["NANOHYBRID_KERNELS"] = forms[0]
        with profile(activities=[ProfilerActivity.CPU]) as found:
            one_step(model, optimizer, data, chosen.mode)
        print(f"{'part':16}{'ms':>10}{'share':>8}{'roofline':>10}")
        for row in rows(model, list(data.layout.lengths), found, stream, product):
            print(f"{row['part']:16}{row['ms']:10.1f}{row['share']:8.1%}{row['roofline_ms']:10.1f}")


if __name__ == "__main__":
    main()
