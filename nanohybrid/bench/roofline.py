"""How many sequences fit, by the engine's memory plan, and their throughput by the roofline of a device.

decode   a step reads the weights once, and the cache of each sequence at its mean context (inputs + outputs /
2)
prefill  2 FLOPs per weight and token, plus causal attention; it does not overlap with decode
output tokens/s = sequences x output tokens / (sequences x prompt time + output tokens x step time)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanohybrid.bench.comparison import Candidate, Workload, max_num_batched_tokens
from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.estimate.budget import Budget, weight_bytes
from nanohybrid.estimate.devices import Device
from nanohybrid.estimate.footprint import Footprint
from nanohybrid.estimate.roofline import decode_step
from nanohybrid.estimate.serving import plan_serve


@dataclass(frozen=True)
class Planned:
    """The plan of a candidate on a workload.

    sequences: how many run at once; 0 if not even one fits.
    prompt, step: seconds of one prompt, and of a decode step of all sequences, by the roofline.
    """

    candidate: Candidate
    workload: Workload
    sequences: int
    prompt: float = 0.0
    step: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.candidate.name} {self.candidate.dtype}"

    @property
    def decode(self) -> float:
        """Decode tokens/s of all sequences together by the roofline, without the time of the prompts."""
        return self.sequences / self.step if self.sequences else 0.0

    @property
    def output(self) -> float:
        """Output tokens/s by the roofline, with the time of the prompts."""
        return output_rate(self.sequences, self.workload, self.prompt, self.step)


def plan(candidate: Candidate, workload: Workload, limit: int, device: Device, scale: int = 1) -> Planned:
    """How many sequences fit in `limit` bytes, and their times by the roofline of `device`."""
    config, sequences = candidate.config, fitting(candidate, workload, limit, scale)
    if not sequences:
        return Planned(candidate, workload, 0)
    step = decode_step(
        config, Budget(limit, workload.mean_context, sequences, candidate.dtype), tile=1
    ).seconds(device)
    return Planned(
        candidate, workload, sequences, prefill_flops(config, workload.input_tokens) / device.flops, step
    )


def output_rate(sequences: int, workload: Workload, prompt: float, step: float) -> float:
    """Output tokens/s of `sequences`, from the seconds of one prompt and of one step of all."""
    return (
        sequences * workload.output_tokens / (sequences * prompt + workload.output_tokens * step)
        if sequences
        else 0.0
    )


def fitting(candidate: Candidate, workload: Workload, limit: int, scale: int = 1) -> int:
    """Sequences of the workload's full length that run at once in `limit` bytes without preemption."""
    footprint = Footprint.of(candidate.config)
    footprint = replace(footprint, weight_bytes=weight_bytes(candidate.config, candidate.dtype))
    try:
        return plan_serve(
            candidate.config, footprint, limit, workload.context, step_tokens=max_num_batched_tokens(scale)
        ).slots
    except InputError:  # not one fits
        return 0


def prefill_flops(config: HybridConfig, tokens: int) -> float:
    """FLOPs of the prefill of one prompt of `tokens` tokens, with logits of its last token only."""
    vocabulary = config.vocab_size * config.hidden_size
    tables = vocabulary if config.tie_word_embeddings else 2 * vocabulary
    mixing = sum(mixer.mixing_flops(config, tokens, 0) for mixer in config.mixers)
    return 2.0 * (Footprint.of(config).parameters - tables) * tokens + mixing
