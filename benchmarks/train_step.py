"""Tokens per second of one training step, forward and backward apart, on packed documents of 20 to 120 tokens.

python benchmarks/train_step.py --preset tiny --mode bf16 --threads 2 --batch-tokens 2048
"""

import argparse
import itertools
import json
import random
import statistics
import time

import torch

from nanohybrid.config import HybridConfig
from nanohybrid.data import Batch
from nanohybrid.model import HybridLM
from nanohybrid.train.allocator import keep_freed_memory
from nanohybrid.train.next_token import next_token_loss
from nanohybrid.train.optimizer import OptimizerConfig, adamw, clip_gradient
from nanohybrid.train.precision import autocast


def batch(tokens: int, vocabulary: int, rng: random.Random) -> Batch:
    """Random documents end to end, every token a target."""
    documents, count = [], 0
    while count < tokens:
        length = rng.randint(20, 120)
        documents.append(([rng.randrange(vocabulary) for _ in range(length)], [1] * length))
        count += length
    return Batch.of(documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--mode", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    model = HybridLM(HybridConfig.preset(arguments.preset), seed=0)
    optimizer, rng = adamw(model, OptimizerConfig()), random.Random(0)
    rows = []
    for step in range(arguments.steps + 5):
        data = batch(arguments.batch_tokens, model.config.vocab_size, rng)
        times = [time.perf_counter()]
        with autocast(arguments.mode, torch.device("cpu")):
            total, count = next_token_loss(model, data)
        times.append(time.perf_counter())
        optimizer.zero_grad()
        (total / count).backward()
        times.append(time.perf_counter())
        clip_gradient(model, 1.0)
        optimizer.step()
        times.append(time.perf_counter())
        if step >= 5:  # the first ones warm up
            rows.append([data.layout.tokens, *(1e3 * (b - a) for a, b in itertools.pairwise(times))])
    tokens, forward, backward, update = (statistics.median(column) for column in zip(*rows, strict=True))
    milliseconds = forward + backward + update
    result = {"preset": arguments.preset, "mode": arguments.mode, "threads": arguments.threads, "torch": torch.__version__}
    result |= {"forward_ms": forward, "backward_ms": backward, "update_ms": update, "tokens_per_second": 1e3 * tokens / milliseconds}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
