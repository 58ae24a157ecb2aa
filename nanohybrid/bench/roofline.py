"""How many sequences fit, by the engine's own plan, and how fast that many can be, by the roofline of a machine.

decode   a step reads the weights once, and each sequence's keys, values and states, at their mean length: inputs + outputs / 2
prefill  2 FLOPs a weight and token, and causal attention; not overlapped with decoding
output tokens per second = sequences x outputs / (prefill + outputs x step)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanohybrid.bench.comparison import Contender, Mix, step_tokens
from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.estimate.budget import Budget, weight_bytes
from nanohybrid.estimate.devices import Device
from nanohybrid.estimate.footprint import Footprint
from nanohybrid.estimate.roofline import decode_step
from nanohybrid.estimate.serving import plan_serve


@dataclass(frozen=True)
class Planned:
    """A contender at a mix: sequences at once (0: not even one fits), and at best the seconds of a prompt and of a step of all."""

    contender: Contender
    mix: Mix
    sequences: int
    prompt: float = 0.0
    step: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.contender.name} {self.contender.dtype}"

    @property
    def decode(self) -> float:
        """Tokens per second of all sequences together, at best, once the prompts are read."""
        return self.sequences / self.step if self.sequences else 0.0

    @property
    def output(self) -> float:
        """Output tokens per second at best, the time of the prompts counted."""
        return output_rate(self.sequences, self.mix, self.prompt, self.step)


def plan(contender: Contender, mix: Mix, cap: int, device: Device, scale: int = 1) -> Planned:
    """What fits `cap` bytes, and the most that `device` can make of it."""
    config, sequences = contender.config, fitting(contender, mix, cap, scale)
    if not sequences:
        return Planned(contender, mix, 0)
    step = decode_step(config, Budget(cap, mix.mean, sequences, contender.dtype), tile=1).seconds(device)
    return Planned(contender, mix, sequences, prefill_flops(config, mix.inputs) / device.flops, step)


def output_rate(sequences: int, mix: Mix, prompt: float, step: float) -> float:
    """Output tokens per second of so many sequences, from the seconds of one prompt and of one step of all; 0 of none."""
    return sequences * mix.outputs / (sequences * prompt + mix.outputs * step) if sequences else 0.0


def fitting(contender: Contender, mix: Mix, cap: int, scale: int = 1) -> int:
    """Sequences of the mix's whole length that run at once, none ever put aside."""
    footprint = Footprint.of(contender.config)
    footprint = replace(footprint, weight_bytes=weight_bytes(contender.config, contender.dtype))
    try:
        return plan_serve(contender.config, footprint, cap, mix.context, step_tokens=step_tokens(scale)).slots
    except InputError:  # not even one fits
        return 0


def prefill_flops(config: HybridConfig, tokens: int) -> float:
    """FLOPs of one prompt, the logits of its last token only."""
    vocabulary = config.vocab_size * config.hidden_size
    tables = vocabulary if config.tie_word_embeddings else 2 * vocabulary
    mixing = sum(mixer.mixing_flops(config, tokens, 0) for mixer in config.mixers)
    return 2.0 * (Footprint.of(config).parameters - tables) * tokens + mixing
