"""Loss and perplexity of a model on held-out documents."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nanohybrid.data import Batch, TokenStore
from nanohybrid.data.store import TokensAndLossMask
from nanohybrid.errors import InputError
from nanohybrid.model import HybridLM
from nanohybrid.ops.losses import chunked_cross_entropy


@dataclass(frozen=True)
class HeldOut:
    """Mean cross-entropy of a target in nats, and the number of targets."""

    loss: float
    targets: int

    @property
    def perplexity(self) -> float:
        """exp(loss); the loss is capped at 700 to stay finite."""
        return math.exp(min(self.loss, 700.0))


@torch.inference_mode()
def loss_of(model: HybridLM, batches: Iterable[Batch]) -> HeldOut:
    """The loss over all targets of the batches. Raises InputError where there is none."""
    total, count = 0.0, 0
    for batch in batches:
        batch = batch.to(model.device)
        hidden_TE = model.hidden(batch.tokens_T, batch.layout)
        total += chunked_cross_entropy(hidden_TE, model.head_weight, batch.targets_T).double().sum().item()
        count += batch.target_count
    if count == 0:
        raise InputError(
            "the held-out documents have no target token: a loss needs documents of at least two tokens with "
            "a loss mask of 1"
        )
    return HeldOut(total / count, count)


def held_out_loss(
    model: HybridLM, store: TokenStore, max_tokens: int = 65_536, batch_tokens: int = 4096, length: int = 4096
) -> HeldOut:
    """The loss on the first documents of a store, up to about `max_tokens` tokens; documents are truncated to
    `length` tokens.

    Raises InputError where they have no target.
    """
    return loss_of(model, _batches(store, max_tokens, batch_tokens, length))


def _batches(store: TokenStore, max_tokens: int, batch_tokens: int, length: int) -> Iterable[Batch]:
    part: list[TokensAndLossMask] = []
    size, left = 0, max_tokens
    for index in range(len(store)):
        tokens, loss = store.document(index)
        if left <= 0:
            break
        tokens, loss = tokens[:length], loss[:length]
        if part and size + len(tokens) > batch_tokens:
            yield Batch.of(part)
            part, size = [], 0
        part.append((tokens, loss))
        size, left = size + len(tokens), left - len(tokens)
    if part:
        yield Batch.of(part)
