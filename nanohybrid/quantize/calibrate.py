"""Documents run through two models at once, layer by layer: the original, and the quantized one that is being
made of it.

Only one layer's weights are in memory. Each layer is quantized by the inputs that it has in use, and after
the last one both models' outputs can be compared.

T tokens · E hidden size · K inputs of a linear · V vocabulary.
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
from nanohybrid.prune.layerwise import LayerwiseModel

LOGIT_ROWS = 512
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class QuantizationQuality:
    """What quantizing changed on documents.

    loss_before, loss_after: mean cross-entropy of a target in nats. agreement: the share of targets at which
    both models have the same most probable token. divergence: the mean KL divergence of the quantized model
    from the original, in nats.
    """

    loss_before: float
    loss_after: float
    agreement: float
    divergence: float
    targets: int


@dataclass
class PairedForward:
    """The hidden states of documents on their way through both models.

    calibration: the batches by which scales are chosen, which only the original reads. evaluation: the
    batches on which the two models are compared.
    """

    calibration: list[Batch]
    evaluation: list[Batch]
    calibration_TE: list[Tensor]
    before_TE: list[Tensor]  # of the evaluation batches, through the original
    after_TE: list[Tensor]  # and through the quantized model
    drift: list[float] = field(
        default_factory=list
    )  # relative difference of the hidden states after each layer

    @classmethod
    def of(cls, model: LayerwiseModel, documents: Calibration, calibrate: bool) -> PairedForward:
        """At the embeddings. With `calibrate` every other document is for calibration and the rest for
        evaluation, else all are for evaluation. Raises InputError where no token for evaluation is a target.
        """
        samples = documents.samples
        calibration = Calibration(samples[::2]) if calibrate else None
        evaluation = Calibration(samples[1::2]) if calibrate and len(samples) > 1 else documents
        first = [] if calibration is None else [batch.to(model.device) for batch in calibration.batches()]
        second = [batch.to(model.device) for batch in evaluation.batches()]
        if not any(batch.target_count for batch in second):
            raise InputError(
                "the documents hold no token that is a target: give some to compare the models on"
            )
        embedded = model.embedded([batch.tokens_T for batch in (*first, *second)])
        before = embedded[len(first) :]
        return cls(first, second, embedded[: len(first)], before, list(before))

    @torch.no_grad()
    def run_layer(self, layer: nn.Module, quantize: Callable[[dict[str, Tensor]], None]) -> None:
        """Run one layer: the original's, then the same after `quantize`, which is given the mean squares [K]
        of each linear's inputs by its name and changes `layer` in place."""
        with _input_squares(layer) as squares:
            self.calibration_TE = [
                layer(h_TE, batch.layout, None)
                for h_TE, batch in zip(self.calibration_TE, self.calibration, strict=True)
            ]
        self.before_TE = [
            layer(h_TE, batch.layout, None)
            for h_TE, batch in zip(self.before_TE, self.evaluation, strict=True)
        ]
        quantize({name: total_K / count for name, (total_K, count) in squares.items()})
        self.after_TE = [
            layer(h_TE, batch.layout, None)
            for h_TE, batch in zip(self.after_TE, self.evaluation, strict=True)
        ]
        self.drift.append(self._drift())

    @torch.no_grad()
    def run_norm(self, norm: nn.Module) -> Tensor | None:
        """Run the final norm; returns the mean squares [E] of the head's inputs on the calibration
        batches."""
        self.before_TE = [norm(h_TE) for h_TE in self.before_TE]
        self.after_TE = [norm(h_TE) for h_TE in self.after_TE]
        squares = [norm(h_TE).float().square() for h_TE in self.calibration_TE]
        return torch.cat(squares).mean(0) if squares else None

    @torch.no_grad()
    def compare(self, before: nn.Module, after: nn.Module) -> QuantizationQuality:
        """Compare the two models' outputs; `before` and `after` are their heads."""
        sums = torch.zeros(4, dtype=torch.float64)
        count = 0
        for batch, first_TE, second_TE in zip(self.evaluation, self.before_TE, self.after_TE, strict=True):
            rows_T = batch.targets_T != IGNORED
            chunks = (tensor[rows_T].split(LOGIT_ROWS) for tensor in (first_TE, second_TE, batch.targets_T))
            for first, second, targets in zip(*chunks, strict=True):
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
        return QuantizationQuality(before_loss, after_loss, agreement, divergence, count)

    def _drift(self) -> float:
        pairs = zip(self.before_TE, self.after_TE, strict=True)
        total = torch.tensor(
            [[(a.float() - b.float()).square().sum(), a.float().square().sum()] for a, b in pairs]
        ).sum(0)
        return float((total[0] / total[1].clamp_min(1e-30)).sqrt())


@contextmanager
def _input_squares(layer: nn.Module) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """While this is open, the squares of each linear's inputs are added up, by its name in `layer`, with the
    count of tokens."""
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
