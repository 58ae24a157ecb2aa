"""Bytes of a training step before it is run: weights, gradients and moments, and the activations that wait for the backward.

What a layer keeps for its gradient is linear in the tokens of the batch, whatever the length of a document: the scan keeps its inputs
and makes states again, attention streams over keys, the loss never holds [tokens, vocabulary]. tests/train/test_memory.py counts
what autograd really keeps, and compares a process's peak.

T tokens · E hidden width · F FFN width · D Mamba's inner width · M B and C of a token (2 G N) · H heads · V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.estimate.units import MIB
from nanohybrid.model.spec import param_specs
from nanohybrid.ops.losses.stream import default_chunk

WIDE = 4  # bytes of fp32: weights, gradients, moments, the residual stream, what the scan returns
PROCESS = 450 * MIB  # torch, numba and what they have compiled


@dataclass(frozen=True)
class TrainingMemory:
    """What a step needs, in bytes. The peak is reached where the backward begins, or later, when gradients outweigh activations."""

    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    cast_bytes: int
    """Matrices in bf16 beside the weights, until their layer's gradient is made."""
    kept_bytes: int
    """Activations that the forward keeps for the backward."""
    loss_bytes: int
    """The head's gradient, a chunk's part of it, and the chunk's logits; not more for more tokens, nor logits for a larger vocabulary."""
    working_bytes: int
    """What one layer needs while its gradient is made."""
    peak_bytes: int
    """All of it at the worst moment, the process itself included."""

    @classmethod
    def of(
        cls, config: HybridConfig, tokens: int, mode: str = "bf16", checkpoint_every: int = 0
    ) -> TrainingMemory:
        """For a batch of `tokens`, by the compiled ops of a CPU; checkpoint_every as in the loop's configuration.

        Raises ConfigError where `mode` is not fp32 or bf16 (FP8 is emulated on a CPU, with copies of its own), or a size is none.
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
        # backwards, layer by layer: gradients come as activations and casts go
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
