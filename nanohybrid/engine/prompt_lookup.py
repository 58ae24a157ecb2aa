"""Speculation by prompt lookup: what followed the last time that the request's latest tokens stood together. No torch.

A draft costs no model. The scheduler puts it behind the token that is due, the model reads all of it in one step, and the
sampler speaks position by position for as long as it says what the draft said (engine.py). Its choice at a position depends on
the logits and on (seed, position) alone, so a draft changes when a token is found, never which.

Where a request does not repeat itself, drafts are wasted rows: a draft grows while all of it is accepted and shrinks to what
was; after one of which nothing was, the request pauses, twice as long each time.
"""

from array import array
from collections.abc import Sequence
from typing import Protocol

MOST_DRAFT_TOKENS = 15  # with the token that is due, a window of 16, to which a ragged batch pads in any case
GRAMS = (
    2,
    3,
    5,
    8,
)  # so many tokens must have stood together before; where the shorter never did, the longer did not either
PAUSE = 64  # tokens, at most, from a useless draft to the next
BYTES = 4


class Lookup:
    """One request's text, and how well its drafts did."""

    __slots__ = ("failures", "length", "limit", "pause", "text")

    def __init__(self, limit: int) -> None:
        self.text = bytearray()
        self.length = 0  # tokens in it
        self.limit = limit  # the longest draft that is worth making
        self.pause, self.failures = 0, 0

    def follow(self, count: int) -> list[int]:
        """What followed the last time, at most `count` tokens; a text that repeats itself goes on doing so."""
        place = -1
        for gram in GRAMS:
            found = self._latest(gram)
            if found < 0:
                break
            place = found + gram
        if place < 0:
            return []
        after = array("i", bytes(self.text[place * BYTES : (place + count) * BYTES])).tolist()
        period = len(after)
        while len(after) < count:
            after.append(after[-period])
        return after

    def _latest(self, gram: int) -> int:
        """Where the last `gram` tokens stood before, or -1: the latest place that has a successor."""
        tail = self.text[-gram * BYTES :]
        end = len(self.text) - BYTES
        while len(tail) == gram * BYTES:
            at = self.text.rfind(tail, 0, end)
            if at % BYTES == 0 or at < 0:
                return at // BYTES
            end = at + len(tail) - 1
        return -1


class Drafting(Protocol):
    """What a drafter reads of a request, and the lookup that it leaves there."""

    forced: Sequence[int]
    draft: list[int]
    lookup: Lookup | None

    @property
    def known(self) -> int: ...

    def slice(self, start: int, length: int) -> list[int]: ...


class Drafter:
    """Makes the drafts of all requests and learns what became of them. `drafted` and `accepted` count tokens."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.drafted, self.accepted = 0, 0

    def propose(self, request: Drafting, room: int) -> list[int]:
        """At most `room` tokens that may follow those known; what the thinking budget will insert is no guess."""
        if request.forced:
            return list(request.forced)[: min(room, self.most)]
        lookup = request.lookup
        if lookup is None:
            lookup = request.lookup = Lookup(self.most)
        if lookup.pause or room < 1:
            lookup.pause = max(lookup.pause - 1, 0)
            return []
        lookup.text += array("i", request.slice(lookup.length, request.known - lookup.length)).tobytes()
        lookup.length = request.known
        return lookup.follow(min(room, lookup.limit))

    def learn(self, request: Drafting, accepted: int) -> None:
        """So many tokens of the request's draft were what it said."""
        drafted = len(request.draft)
        self.drafted += drafted
        self.accepted += accepted
        lookup = request.lookup
        if lookup is None:
            return
        if accepted:
            lookup.failures = 0
            lookup.limit = min(2 * drafted, self.most) if accepted == drafted else accepted
        else:
            lookup.failures += 1
            lookup.limit = 1
            lookup.pause = min(2**lookup.failures, PAUSE)
