"""Prompts that begin as an earlier one did: checkpoints of what the beginning left behind, in host memory. No torch.

A hybrid cannot go on from anywhere: its recurrent state exists only where somebody stood. So a prompt stops at a few places
and leaves a checkpoint there: conv and SSM state, and the pages of keys and values up to there, which later checkpoints of
the same text share. Places are those that the caller names (the end of system and tools; just before the `<think>` of the
generation prompt, since the next turn's history has no trace), multiples of `every`, and the last multiple of 128 below the end.

A checkpoint is found by a digest of exactly its tokens, under a salt: who has another salt can neither find it nor learn, from
an answer, that it exists. The least recently used goes first when the budget of bytes is exceeded.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from nanohybrid.engine.request import Request
from nanohybrid.ops.sizes import CHUNK

REMEMBERED = 4096  # keys of evicted checkpoints, to say why a prompt was not found
Key = tuple[str, bytes]
Parts = list[tuple[int, int]]  # identity and bytes of each piece of memory that a checkpoint holds


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What the first `position` tokens of some prompt left behind. `saved` and what it is made of are the runner's."""

    ids: np.ndarray
    saved: Any
    parts: Parts

    @property
    def position(self) -> int:
        return len(self.ids)


class PrefixCache:
    """Checkpoints by (salt, digest of their tokens), within `budget_bytes`."""

    def __init__(self, budget_bytes: int, every: int = 1024) -> None:
        if every < CHUNK or every % CHUNK:
            raise ValueError(f"checkpoints can be at multiples of 128 tokens, not of {every}")
        self.budget_bytes, self.every = budget_bytes, every
        self.bytes = 0
        self.hits, self.misses = 0, Counter[str]()
        self._found: OrderedDict[Key, Checkpoint] = OrderedDict()  # the least recently used first
        self._evicted: OrderedDict[Key, int] = OrderedDict()
        self._salts: dict[bytes, set[str]] = {}
        self._positions: Counter[int] = Counter()  # of the checkpoints that are here or were evicted
        self._holders: Counter[int] = Counter()  # how many checkpoints hold each piece of memory

    def __len__(self) -> int:
        return len(self._found)

    def stops(self, length: int, wanted: Iterable[int]) -> list[int]:
        """Where a prompt of this length leaves checkpoints, the last first."""
        places = {place for place in wanted if 0 < place <= length} | set(
            range(self.every, length + 1, self.every)
        )
        places.add((length - 1) // CHUNK * CHUNK)
        return sorted(places - {0}, reverse=True)

    def find(self, prompt: Sequence[int], salt: str) -> Checkpoint | str:
        """The longest checkpoint that this prompt begins with and does not end with, else why there is none.

        The last token is always computed anew: its logits are wanted, and no checkpoint keeps them.
        """
        ids = np.asarray(prompt, dtype=np.int32)
        digests = _digests(ids, sorted(place for place in self._positions if place < len(ids)))
        for digest in reversed(digests):
            found = self._found.get((salt, digest))
            if found is not None:
                self._found.move_to_end((salt, digest))
                self.hits += 1
                return found
        reason = self._why(ids, digests, salt)
        self.misses[reason.split(" at ")[0]] += 1
        return "no checkpoint" if reason == "salt" else reason

    def put(self, tokens: Sequence[int], salt: str, saved: object, parts: Parts) -> None:
        """Keep a checkpoint of exactly these tokens, unless it alone exceeds the budget; what it shares with others is
        counted once."""
        ids = np.asarray(tokens, dtype=np.int32)
        digest = _digests(ids, [len(ids)])[0]
        key = (salt, digest)
        if key in self._found:
            self._found.move_to_end(key)
            return
        checkpoint = Checkpoint(ids, saved, [*parts, (id(ids), ids.nbytes)])
        if sum(size for _, size in checkpoint.parts) > self.budget_bytes:
            return  # it would drive out all others, and then itself
        self._found[key] = checkpoint
        self._salts.setdefault(digest, set()).add(salt)
        if key in self._evicted:
            del self._evicted[key]
        else:
            self._positions[len(ids)] += 1
        for part, size in checkpoint.parts:
            self.bytes += 0 if self._holders[part] else size
            self._holders[part] += 1
        while self.bytes > self.budget_bytes:
            self._evict()

    def holds(self, tokens: Sequence[int], salt: str) -> bool:
        """Whether there is a checkpoint of exactly these tokens."""
        ids = np.asarray(tokens, dtype=np.int32)
        return (salt, _digests(ids, [len(ids)])[0]) in self._found

    def _evict(self) -> None:
        key, gone = self._found.popitem(last=False)
        for part, size in gone.parts:
            self._holders[part] -= 1
            if not self._holders[part]:
                del self._holders[part]
                self.bytes -= size
        self._salts[key[1]].discard(key[0])
        if not self._salts[key[1]]:
            del self._salts[key[1]]
        self._evicted[key] = gone.position
        if len(self._evicted) > REMEMBERED:
            self._positions -= Counter([self._evicted.popitem(last=False)[1]])

    def _why(self, ids: np.ndarray, digests: list[bytes], salt: str) -> str:
        if any((salt, digest) in self._evicted for digest in digests):
            return "evicted"
        if any(self._salts.get(digest) for digest in digests):
            return "salt"
        shared = max(
            (_shared(ids, c.ids) for (owner, _), c in self._found.items() if owner == salt), default=0
        )
        return f"diverged at token {shared}" if shared else "no checkpoint"


def begin(cache: PrefixCache, request: Request) -> None:
    """Look a prompt up as it is admitted: where it may begin, and where it shall leave checkpoints."""
    found = cache.find(request.prompt, request.salt)
    if isinstance(found, str):
        request.cache_miss = found
    else:
        request.saved, request.cached = found.saved, found.position
        request.computed, request.cache_miss = found.position, None
        request.kept = found.saved.pages[: found.position // CHUNK]
    places = cache.stops(len(request.prompt), request.checkpoint_at)
    request.stops = [place for place in places if place > request.computed]


def _digests(ids: np.ndarray, places: list[int]) -> list[bytes]:
    """A digest of the first so many tokens, for each of these ascending places; one pass over the tokens."""
    running, begun, out = blake2b(digest_size=20), 0, []
    for place in places:
        running.update(ids[begun:place].tobytes())
        out.append(running.digest())
        begun = place
    return out


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    length = min(len(a), len(b))
    other = np.flatnonzero(a[:length] != b[:length])
    return int(other[0]) if len(other) else length
