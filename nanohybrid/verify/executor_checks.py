"""Check that every executor gives the plain forward's logits for any chunking, packing and batching of a text."""

from itertools import pairwise

import torch
from torch import Tensor

from nanohybrid.verify.model_under_test import LENGTH, ExecutorUnderTest, ModelUnderTest
from nanohybrid.verify.result import CheckResult

DOCUMENTS = (40, 1, 103)
CUTS = (0, 50, 51, 130, LENGTH)
STEPS_FROM, STEPS_TO = 124, 134  # across a chunk boundary
TEXTS = ((0, 30), (60, 84), (100, 112))  # start and end of three sequences in the text
SLOTS = (3, 0, 2)
SCHEDULE = ((20, 0, 0), (21, 11, 0), (25, 12, 5), (26, 13, 6), (30, 24, 12))
"""Tokens of each of the three sequences that are read after each call."""


def packed_equals_unpacked(subject: ModelUnderTest) -> CheckResult:
    """The plain forward over packed documents against each document alone; fails if a document sees another."""
    packed = subject.read(subject.text, DOCUMENTS)
    alone = [subject.read(part, [len(part)]) for part in subject.text.split(list(DOCUMENTS))]
    return subject.result("model: packed == unpacked", f"{_list(DOCUMENTS)} tokens", packed, torch.cat(alone))


def whole_equals_plain(executor: ExecutorUnderTest) -> CheckResult:
    """The whole text in one call of the executor against the plain forward."""
    found = _feed(executor, (0, LENGTH))
    return _result(executor, "whole == plain forward", f"{LENGTH} tokens", found, executor.subject.reference)


def chunked_equals_whole(executor: ExecutorUnderTest) -> CheckResult:
    """A prompt prefilled in uneven chunks; fails if states or keys do not carry over."""
    pieces = [last - first for first, last in pairwise(CUTS)]
    found = _feed(executor, CUTS)
    return _result(
        executor, "chunked == whole", f"pieces of {_list(pieces)}", found, executor.subject.reference
    )


def step_equals_whole(executor: ExecutorUnderTest) -> CheckResult:
    """Single tokens after a prefill; fails if decode differs from the forward over the whole text."""
    found = _feed(executor, (0, *range(STEPS_FROM, STEPS_TO + 1)))[STEPS_FROM:]
    on = f"{STEPS_TO - STEPS_FROM} steps after {STEPS_FROM} tokens"
    return _result(executor, "step == whole", on, found, executor.subject.reference[STEPS_FROM:STEPS_TO])


def batch_equals_alone(executor: ExecutorUnderTest) -> CheckResult:
    """Prefill, continuation and decode of three sequences in shared calls, against each alone by the plain forward."""
    texts = [executor.subject.text[first:last] for first, last in TEXTS]
    opened = executor.open(max(SLOTS) + 1)
    parts: list[list[Tensor]] = [[] for _ in texts]
    read = (0,) * len(texts)
    for target in SCHEDULE:
        rows = [i for i in range(len(texts)) if target[i] > read[i]]
        pieces = [texts[i][read[i] : target[i]] for i in rows]
        logits = executor.read(opened, pieces, [read[i] for i in rows], [SLOTS[i] for i in rows])
        for i, part in zip(rows, logits, strict=True):
            parts[i].append(part)
        read = target
    alone = torch.cat([executor.subject.read_alone(*text) for text in TEXTS])
    together = torch.cat([part for row in parts for part in row])
    on = f"{len(texts)} texts, {len(SCHEDULE)} mixed calls"
    return _result(executor, "batch == alone", on, together, alone)


def _result(executor: ExecutorUnderTest, what: str, on: str, found: Tensor, expected: Tensor) -> CheckResult:
    return executor.subject.result(f"{executor.name}: {what}", on, found, expected)


def _feed(executor: ExecutorUnderTest, cuts: tuple[int, ...]) -> Tensor:
    """Logits [LENGTH, V] of the text, computed in chunks that end at `cuts`."""
    opened, text = executor.open(1), executor.subject.text
    parts = [executor.read(opened, [text[first:last]], [first], [0])[0] for first, last in pairwise(cuts)]
    return torch.cat(parts)


def _list(numbers: tuple[int, ...] | list[int]) -> str:
    return " + ".join(map(str, numbers))
