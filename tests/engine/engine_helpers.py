"""Helpers of the engine's tests."""

import random

import torch

from nanohybrid.engine import Engine
from nanohybrid.model import Layout


class NoTextTokenizer:
    """A tokenizer whose tokens have no text: scheduling must not depend on it."""

    def token_bytes(self, token: int) -> bytes:
        return b""


def random_ids(length: int, seed: int = 0) -> list[int]:
    """A prompt of random ids of the tests' tokenizer, without special tokens."""
    rng = random.Random(seed)
    return [rng.randrange(13, 269) for _ in range(length)]


def run_until_idle(engine: Engine, max_steps: int = 5000) -> None:
    """Step until no request runs or waits. Fails where that takes too many steps."""
    for _ in range(max_steps):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError(f"requests were left after {max_steps} steps")


def is_idle(engine: Engine) -> bool:
    """Whether no request runs or waits, and no slot, page or copy is left."""
    scheduler = engine.scheduler
    return not (engine.busy or scheduler.slots.num_used or scheduler.pages.num_used or scheduler.swaps)


def greedy_reference(model, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy decoding by definition: the whole text through the model for each token, without a cache.

    Returns the tokens and their log-probabilities.
    """
    text, logprobs = list(ids), []
    with torch.inference_mode():
        for _ in range(count):
            hidden_TE = model.hidden(torch.tensor(text), Layout.packed([len(text)]))
            row_V = model.head(hidden_TE[-1]).log_softmax(-1)
            text.append(int(row_V.argmax()))
            logprobs.append(float(row_V.max()))
    return text[len(ids) :], logprobs


def record_calls(monkeypatch, owner, name: str) -> list[tuple]:
    """The positional arguments of every call of a method from now on; the method still runs."""
    calls, method = [], getattr(owner, name)

    def recording(*arguments):
        calls.append(arguments)
        return method(*arguments)

    monkeypatch.setattr(owner, name, recording)
    return calls
