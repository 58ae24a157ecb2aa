"""A training step of a hybrid of 1.05B parameters, in bf16 and in FP8 by turns: time, MFU, and both losses.

Both train from the same weights on the same random documents, as nanohybrid/train does. MFU counts 6
operations for each token and each weight but the embedding's, relative to the measured bf16 rate. Scan and
attention are not counted.
"""

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import torch
from bench import Bench, wait

from nanohybrid.config import HybridConfig
from nanohybrid.data import Batch
from nanohybrid.estimate import Footprint
from nanohybrid.model import HybridLM
from nanohybrid.presets import preset
from nanohybrid.train.next_token import next_token_loss
from nanohybrid.train.optimizer import OptimizerConfig, adamw, clip_grad_norm
from nanohybrid.train.precision import autocast, fp8_linears

TITLE = "Median step (forward, backward, clip, AdamW) after two to warm up, bf16 and FP8 by turns."
BILLION = dict(
    pattern="M-M-M-M*-M-M-M-M*-M-M-M-M-", vocab_size=65_536, hidden_size=2048, intermediate_size=8192,
    num_attention_heads=16, num_key_value_heads=4, head_dim=128, mamba_num_heads=64, mamba_head_dim=64,
)  # fmt: skip
WARM_UP = 2


def run(bench: Bench, emit: Callable[[dict], None]) -> None:
    config = preset("tiny") if bench.toy else HybridConfig(**BILLION)
    tokens, length, steps = (64, 30, 2) if bench.toy else (16_384, 4096, 10)
    trainers = {mode: Trainer(config, mode, bench.device) for mode in ("bf16", "fp8")}
    rng = random.Random(0)
    for step in range(WARM_UP + steps):
        data = documents(tokens, length, config.vocab_size, rng).to(bench.device)
        for trainer in trainers.values():
            trainer.step(data, step >= WARM_UP)
    weights = Footprint.of(config).parameters - config.vocab_size * config.hidden_size
    plain = median(trainers["bf16"].times)
    for mode, trainer in trainers.items():
        ms = median(trainer.times)
        row = {
            "mode": mode,
            "ms": ms,
            "min_ms": min(trainer.times),
            "max_ms": max(trainer.times),
            "tokens/s": 1e3 * tokens / ms,
        }
        row |= {
            "MFU": 6e3 * weights * tokens / ms / bench.bf16,
            "over_bf16": plain / ms,
            "last_loss": trainer.losses[-1],
        }
        peak = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None
        emit(row | {"peak_GiB_of_both": peak})


class Trainer:
    """A model in training. FP8 leaves the two outermost layers at each end in bf16, as the recipe does; a toy
    has too few layers.
    """

    def __init__(self, config: HybridConfig, mode: str, device: torch.device) -> None:
        with torch.device(device):
            self.model = HybridLM(config, seed=0)
        self.optimizer = adamw(self.model, OptimizerConfig(learning_rate=3e-4))
        self.mode, self.device = mode, device
        self.outer = 2 if config.num_hidden_layers > 8 else 0
        self.times: list[float] = []
        self.losses: list[float] = []

    def step(self, data: Batch, timed: bool) -> None:
        layers = self.model.backbone.layers
        wait(self.device)
        began = time.perf_counter()
        with (
            autocast("bf16", self.device),
            fp8_linears(layers, self.outer) if self.mode == "fp8" else nullcontext(),
        ):
            total, count = next_token_loss(self.model, data)
            (total / count).backward()
        clip_grad_norm(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait(self.device)
        if timed:
            self.times.append(1e3 * (time.perf_counter() - began))
        self.losses.append(total.item() / count)


def documents(tokens: int, length: int, vocabulary: int, rng: random.Random) -> Batch:
    """Arithmetic sequences: they can be learned, so a precision that fails to learn is visible."""
    found = []
    for _ in range(tokens // length + (tokens % length > 0)):
        begin, stride = rng.randrange(vocabulary), rng.randrange(1, 8)
        found.append(([(begin + stride * i) % vocabulary for i in range(length)], [1] * length))
    return Batch.of(found)
