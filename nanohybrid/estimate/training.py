"""Bytes of a training step before it is run: weights, gradients and moments, and the activations that wait
for the backward.

The bytes that a layer saves for the backward are linear in the tokens of the batch, for documents of any
length: the scan saves its inputs and recomputes states, attention streams over keys, and the loss never holds
[tokens, vocabulary]. tests/train/test_memory.py counts the tensors that autograd saves, and compares with the
peak of a process.

T tokens · E hidden width · F FFN width · D Mamba's inner width · M B and C of a token (2 G N) · H heads · V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.estimate.units import MIB
from nanohybrid.model.spec import param_specs
from nanohybrid.ops.losses.stream import default_chunk

WIDE = 4  # bytes of fp32: weights, gradients, moments, residual stream, the scan's output
PROCESS = 450 * MIB  # torch, numba and what they have compiled


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step.

    The peak is at the start of the backward, or later if the gradients grow faster than the activations are
    freed.
    """

    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    cast_bytes: int
    """Matrices in bf16 beside the weights, until their layer's gradient is made."""
    kept_bytes: int
    """Activations that the forward saves for the backward."""
    loss_bytes: int
    """The head's gradient, one chunk's share of it, and the logits of the chunk.

    The number of tokens does not matter.
    """
    working_bytes: int
    """Working memory of one layer while its gradient is computed."""
    peak_bytes: int
    """The peak of all parts together, with the process itself."""

    @classmethod
    def of(
        cls, config: HybridConfig, tokens: int, mode: str = "bf16", checkpoint_every: int = 0
    ) -> TrainingMemory:
        """Estimate a batch of `tokens` tokens with the CPU's ops; checkpoint_every as in LoopConfig.

        Raises ConfigError if `mode` is neither fp32 nor bf16 (FP8 is emulated on a CPU, with extra copies),
        or if a size is not positive.
        """
        if mode not in ("fp32", "bf16") or tokens < 1 or checkpoint_every < 0:
            asked = f"a step of {tokens} tokens in {mode}, checkpoint_every {checkpoint_every}"
            raise ConfigError(f"{asked}: modes are fp32 and bf16, sizes positive")
        narrow = 2 if mode == "bf16" else WIDE
        inside = [tokens * mixer.saved_bytes(config, narrow) for mixer in config.mixers]
        stream = tokens * WIDE * config.hidden_size
        made_again = [
            bool(checkpoint_every) and index % checkpoint_every == 0 for index in range(len(inside))
        ]
        kept_layers = [
            stream + (0 if again else layer) for layer, again in zip(inside, made_again, strict=True)
        ]
        layers = [sizes(config, index) for index in range(len(inside))]
        casts = [2 * matrices if mode == "bf16" else 0 for _, matrices in layers]
        total = sum(prod(one.shape) for one in param_specs(config).values())
        head = config.vocab_size * config.hidden_size
        part = (
            narrow * head if mode == "bf16" else 0
        )  # a chunk's part of the head's gradient, before it is added
        loss = (
            (WIDE + narrow) * head
            + part
            + min(default_chunk(config.vocab_size), tokens) * config.vocab_size * narrow
        )
        kept_bytes = (
            sum(kept_layers) + stream + tokens * narrow * config.hidden_size
        )  # and the last norm's input and output
        working = max(layer + 2 * stream for layer in inside)
        fixed = 3 * WIDE * total + PROCESS  # weights and moments
        # backward, layer by layer: gradients are allocated as activations and casts are freed
        peak = (
            kept_bytes + sum(casts) + max(loss, 2 * WIDE * head)
        )  # the gradient is held twice while it is scaled
        gradients, waiting = WIDE * head, kept_bytes - stream
        for index in reversed(range(len(inside))):
            again = inside[index] if made_again[index] else 0
            cast = (
                sum(cast for cast, gone in zip(casts[: index + 1], made_again, strict=False) if not gone)
                + casts[index]
            )
            peak = max(
                peak,
                gradients + WIDE * layers[index][0] + waiting + again + cast + inside[index] + 2 * stream,
            )
            waiting -= kept_layers[index]
            gradients += WIDE * layers[index][0]
        peak = max(peak, WIDE * total + WIDE * head)  # the embedding's gradient last
        return cls(
            WIDE * total, WIDE * total, 2 * WIDE * total, sum(casts), kept_bytes, loss, working, fixed + peak
        )


def sizes(config: HybridConfig, layer: int) -> tuple[int, int]:
    """Parameters of a layer, and how many of them are in its linears."""
    mine = {name: one.shape for name, one in param_specs(config).items() if one.layer == layer}
    linears = sum(prod(shape) for name, shape in mine.items() if len(shape) == 2 and "conv1d" not in name)
    return sum(prod(shape) for shape in mine.values()), linears
