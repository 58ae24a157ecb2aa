"""However a text is cut, packed or batched, the model says the same of it."""

from itertools import pairwise

import torch
from torch import Tensor

from nanohybrid.verify.line import Line
from nanohybrid.verify.subject import LENGTH, Subject

DOCUMENTS = (40, 1, 103)
CUTS = (0, 50, 51, 130, LENGTH)
STEPS_FROM, STEPS_TO = 124, 134  # over the border of a chunk
TEXTS = ((0, 30), (60, 84), (100, 112))  # where in the text three sequences begin and end
SLOTS = (3, 0, 2)
SCHEDULE = (
    (20, 0, 0),
    (21, 11, 0),
    (25, 12, 5),
    (26, 13, 6),
    (30, 24, 12),
)  # tokens each has read after each call


def packed_is_unpacked(subject: Subject) -> Line:
    """Documents packed end to end against each alone: does one see the one before it?"""
    packed = subject.read(subject.text, DOCUMENTS)
    alone = [subject.read(part, [len(part)]) for part in subject.text.split(list(DOCUMENTS))]
    return subject.line("packed == unpacked", f"{_list(DOCUMENTS)} tokens", packed, torch.cat(alone))


def chunked_is_whole(subject: Subject) -> Line:
    """A prompt prefilled in uneven pieces against the whole: do states and keys carry over?"""
    pieces = [last - first for first, last in pairwise(CUTS)]
    return subject.line("chunked == whole", f"pieces of {_list(pieces)}", _feed(subject, CUTS), subject.truth)


def step_is_whole(subject: Subject) -> Line:
    """Token by token after a prefill, against the whole: is decoding the forward of training?"""
    found = _feed(subject, (0, *range(STEPS_FROM, STEPS_TO + 1)))
    on = f"{STEPS_TO - STEPS_FROM} steps after {STEPS_FROM} tokens"
    return subject.line("step == whole", on, found[STEPS_FROM:], subject.truth[STEPS_FROM:STEPS_TO])


def batch_is_alone(subject: Subject) -> Line:
    """Prefill, continuation and decode of three sequences in shared calls, against each alone."""
    texts = [subject.text[first:last] for first, last in TEXTS]
    state = subject.state(max(SLOTS) + 1)
    parts: list[list[Tensor]] = [[] for _ in texts]
    read = (0,) * len(texts)
    for target in SCHEDULE:
        rows = [i for i in range(len(texts)) if target[i] > read[i]]
        pieces = [texts[i][read[i] : target[i]] for i in rows]
        logits = subject.read_stored(pieces, [read[i] for i in rows], [SLOTS[i] for i in rows], state)
        for i, part in zip(rows, logits, strict=True):
            parts[i].append(part)
        read = target
    alone = torch.cat([subject.read(text, [len(text)]) for text in texts])
    together = torch.cat([part for row in parts for part in row])
    return subject.line("batch == alone", f"{len(texts)} texts, {len(SCHEDULE)} mixed calls", together, alone)


def _feed(subject: Subject, cuts: tuple[int, ...]) -> Tensor:
    """Logits of the text given piece by piece."""
    state = subject.state(1)
    parts = [
        subject.read_stored([subject.text[first:last]], [first], [0], state)[0]
        for first, last in pairwise(cuts)
    ]
    return torch.cat(parts)


def _list(numbers: tuple[int, ...] | list[int]) -> str:
    return " + ".join(map(str, numbers))
