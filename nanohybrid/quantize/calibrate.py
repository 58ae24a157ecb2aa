"""Documents carried through two models at once, layer by layer: the original and the quantized one that is being made of it.

So one layer's weights are in memory and no more, each layer can be quantized by what enters it in use, and when the last is done
both models' outputs are there to be compared.

T tokens · E embedding · K inputs of a linear · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanohybrid.data import Batch
from nanohybrid.data.packing import IGNORED
from nanohybrid.errors import InputError
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.layerwise import Parts

ROWS = 512  # tokens whose logits are held at once


@dataclass(frozen=True)
class Quality:
    """What quantizing changed on documents: mean losses of a target in nats, the share of targets at which both models' likeliest
    token is the same, and the mean KL divergence of the quantized model from the original in nats."""

    loss_before: float
    loss_after: float
    agreement: float
    divergence: float
    targets: int


@dataclass
class Carried:
    """Documents on their way: `learned` are what scales are chosen by, `judged` what the two models are compared on."""

    learned: list[Batch]
    judged: list[Batch]
    learned_TE: list[Tensor]
    before_TE: list[Tensor]  # the judged documents, through the original
    after_TE: list[Tensor]  # and through the quantized model
    drift: list[float] = field(default_factory=list)  # of the hidden states, relative, after each layer

    @classmethod
    def of(cls, parts: Parts, documents: Calibration, learn: bool) -> Carried:
        """At the beginning. With `learn` every other document is learned from and the rest are judged; else all are judged."""
        learned = Calibration(documents.samples[::2]) if learn else None
        judged = Calibration(documents.samples[1::2]) if learn and len(documents.samples) > 1 else documents
        first = [] if learned is None else [batch.to(parts.device) for batch in learned.batches()]
        second = [batch.to(parts.device) for batch in judged.batches()]
        if not any(batch.target_count for batch in second):
            raise InputError(
                "the documents hold no token that is a target: give some to compare the models on"
            )
        embedded = parts.embedded([batch.tokens_T for batch in (*first, *second)])
        before = embedded[len(first) :]
        return cls(first, second, embedded[: len(first)], before, list(before))

    @torch.no_grad()
    def through(self, layer: nn.Module, quantize: Callable[[dict[str, Tensor]], None]) -> None:
        """Through one layer: the original's, then the same after `quantize`, which gets the mean squares of each linear's inputs."""
        with _watched(layer) as squares:
            self.learned_TE = [
                layer(h_TE, batch.layout, None)
                for h_TE, batch in zip(self.learned_TE, self.learned, strict=True)
            ]
        self.before_TE = [
            layer(h_TE, batch.layout, None) for h_TE, batch in zip(self.before_TE, self.judged, strict=True)
        ]
        quantize({name: total_K / count for name, (total_K, count) in squares.items()})
        self.after_TE = [
            layer(h_TE, batch.layout, None) for h_TE, batch in zip(self.after_TE, self.judged, strict=True)
        ]
        self.drift.append(self._drift())

    @torch.no_grad()
    def normed(self, norm: nn.Module) -> Tensor | None:
        """Through the final norm; returns the mean squares of the head's inputs on what is learned from."""
        self.before_TE = [norm(h_TE) for h_TE in self.before_TE]
        self.after_TE = [norm(h_TE) for h_TE in self.after_TE]
        squares = [norm(h_TE).float().square() for h_TE in self.learned_TE]
        return torch.cat(squares).mean(0) if squares else None

    @torch.no_grad()
    def compared(self, before: nn.Module, after: nn.Module) -> Quality:
        """The two models' outputs by their heads."""
        sums = torch.zeros(4, dtype=torch.float64)
        count = 0
        for batch, first_TE, second_TE in zip(self.judged, self.before_TE, self.after_TE, strict=True):
            rows_T = batch.targets_T != IGNORED
            pieces = (tensor[rows_T].split(ROWS) for tensor in (first_TE, second_TE, batch.targets_T))
            for first, second, targets in zip(*pieces, strict=True):
                logs, logs_after = (
                    torch.log_softmax(head(h).float(), -1) for head, h in ((before, first), (after, second))
                )
                losses = [
                    -logs_of.gather(-1, targets[:, None]).double().sum() for logs_of in (logs, logs_after)
                ]
                same = (logs.argmax(-1) == logs_after.argmax(-1)).sum().double()
                sums += torch.stack([*losses, same, (logs.exp() * (logs - logs_after)).double().sum()]).cpu()
                count += len(targets)
        before_loss, after_loss, agreement, divergence = (sums / count).tolist()
        return Quality(before_loss, after_loss, agreement, divergence, count)

    def _drift(self) -> float:
        pairs = zip(self.before_TE, self.after_TE, strict=True)
        total = torch.tensor(
            [[(a.float() - b.float()).square().sum(), a.float().square().sum()] for a, b in pairs]
        ).sum(0)
        return float((total[0] / total[1].clamp_min(1e-30)).sqrt())


@contextmanager
def _watched(layer: nn.Module) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Inside, the squares of what enters each linear of `layer` are added up, by its name there, with the count of tokens."""
    squares: dict[str, tuple[Tensor, int]] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_TK = inputs[0].float()
            total_K, count = squares.get(name, (torch.zeros_like(x_TK[0]), 0))
            squares[name] = (total_K + x_TK.square().sum(0), count + len(x_TK))

        return add

    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(hook(name)))
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()
