"""The contest run: one engine, random weights, as many sequences as the plan says, and the rates of the machine it runs on."""

from __future__ import annotations

import random
import time

import torch

from nanohybrid.compress.devices import Device
from nanohybrid.engine import Engine, SamplingParams
from nanohybrid.engine.random_weights import random_model, stand_in_tokenizer
from nanohybrid.headline.contest import Contender, step_tokens
from nanohybrid.headline.machine import Machine
from nanohybrid.headline.roofline import Planned
from nanohybrid.model.packed import prepare
from nanohybrid.model.quantized import quantize_model

TRIES = 7


class Runner:
    """One contender's model, kept between mixes."""

    def __init__(self, contender: Contender, device: str = "cpu", seed: int = 0) -> None:
        self.model = random_model(contender.config, torch.bfloat16, seed, device)
        if contender.dtype != "bf16":
            quantize_model(self.model, contender.dtype)
        prepare(self.model)
        self.tokenizer = stand_in_tokenizer(contender.config)

    def output_tokens_per_second(self, planned: Planned, scale: int, seed: int = 0) -> float:
        """Of a whole job: all prompts in, all outputs out, each sequence from beginning to end."""
        mix, draw = planned.mix, random.Random(seed)
        vocabulary = self.model.config.vocab_size
        prompts = [[draw.randrange(vocabulary) for _ in range(mix.inputs)] for _ in range(planned.sequences)]
        options = {"token_budget": step_tokens(scale)}
        engine = Engine.sized_for(self.model, self.tokenizer, prompts, mix.outputs, planned.sequences, **options)
        params = SamplingParams(max_tokens=mix.outputs, ignore_eos=True)
        began = time.perf_counter()
        done = engine.generate(prompts, params)
        seconds = time.perf_counter() - began
        return sum(len(completion.token_ids) for completion in done) / seconds


def this_machine(device: str = "cpu") -> Device:
    """Its rates as a roofline wants them: the best of a few looks."""
    return Device("this machine", 0, *Machine(device).rates(TRIES, min))
