"""The prefix cache: snapshots of what the beginning of a prompt left behind, in host memory. No torch.

Recurrent state cannot be truncated, so a prompt can only be continued at a position where its state was
saved.
Each prompt therefore pauses at a few cache breakpoints, where a snapshot is saved: conv and SSM states, and
    the KV pages up to there, which snapshots of the same text share. Breakpoints are those that the caller
    names (the end of system message and tools; just before the `<think>` of the generation prompt, since
    later turns do not show the trace), the multiples of `interval`, and the last multiple of 128 below the
    end of the prompt.

A snapshot is found by a digest of exactly its tokens, together with a salt. A request with another salt can
neither find it nor learn from an answer that it exists. Where the budget of bytes is exceeded, the least
recently used snapshot is evicted.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from nanohybrid.engine.request import Request
from nanohybrid.ops.sizes import CHUNK

MAX_EVICTED_KEYS = 4096  # keys of evicted snapshots that are remembered, to say why a prompt was not found
Key = tuple[str, bytes]
Parts = list[tuple[int, int]]  # identity and bytes of each piece of memory that a snapshot holds


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state after the tokens `ids`.

    `saved` is the runner's copy, and `parts` the memory that it holds.
    """

    ids: np.ndarray
    saved: Any
    parts: Parts

    @property
    def position(self) -> int:
        return len(self.ids)


class PrefixCache:
    """Snapshots by (salt, digest of their tokens), within `budget_bytes`.

    interval: a long prompt leaves a snapshot at each multiple of so many tokens. Raises ValueError where it
        is no multiple of 128.
    """

    def __init__(self, budget_bytes: int, interval: int = 1024) -> None:
        if interval < CHUNK or interval % CHUNK:
            raise ValueError(f"snapshots can be at multiples of {CHUNK} tokens, not of {interval}")
        self.budget_bytes, self.interval = budget_bytes, interval
        self.bytes = 0
        self.hits, self.misses = 0, Counter[str]()
        self._entries: OrderedDict[Key, Snapshot] = OrderedDict()  # the least recently used first
        self._evicted: OrderedDict[Key, int] = OrderedDict()
        self._salts: dict[bytes, set[str]] = {}
        self._positions: Counter[int] = Counter()  # of the snapshots that are here or were evicted
        self._references: Counter[int] = Counter()  # how many snapshots hold each piece of memory

    def __len__(self) -> int:
        return len(self._entries)

    def breakpoints(self, length: int, wanted: Iterable[int]) -> list[int]:
        """The positions where a prompt of `length` tokens saves snapshots, the last first.

        wanted: positions that the caller names.
        """
        positions = {position for position in wanted if 0 < position <= length}
        positions.update(range(self.interval, length + 1, self.interval))
        positions.add((length - 1) // CHUNK * CHUNK)
        return sorted(positions - {0}, reverse=True)

    def find(self, prompt: Sequence[int], salt: str) -> Snapshot | str:
        """The longest snapshot of a proper prefix of this prompt, or the reason why there is none.

        The last token is always computed, since its logits are needed and no snapshot holds them.
        """
        ids = np.asarray(prompt, dtype=np.int32)
        digests = _digests(ids, sorted(position for position in self._positions if position < len(ids)))
        for digest in reversed(digests):
            found = self._entries.get((salt, digest))
            if found is not None:
                self._entries.move_to_end((salt, digest))
                self.hits += 1
                return found
        reason = self._why(ids, digests, salt)
        self.misses[reason.split(" at ")[0]] += 1
        return "no checkpoint" if reason == "salt" else reason

    def put(self, tokens: Sequence[int], salt: str, saved: object, parts: Parts) -> None:
        """Add a snapshot of exactly these tokens, unless it alone exceeds the budget.

        Memory that several snapshots share is counted once.
        """
        ids = np.asarray(tokens, dtype=np.int32)
        digest = _digests(ids, [len(ids)])[0]
        key = (salt, digest)
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        snapshot = Snapshot(ids, saved, [*parts, (id(ids), ids.nbytes)])
        if sum(size for _, size in snapshot.parts) > self.budget_bytes:
            return  # it would evict all others, and then itself
        self._entries[key] = snapshot
        self._salts.setdefault(digest, set()).add(salt)
        if key in self._evicted:
            del self._evicted[key]
        else:
            self._positions[len(ids)] += 1
        for part, size in snapshot.parts:
            self.bytes += 0 if self._references[part] else size
            self._references[part] += 1
        while self.bytes > self.budget_bytes:
            self._evict()

    def contains(self, tokens: Sequence[int], salt: str) -> bool:
        """Whether there is a snapshot of exactly these tokens."""
        ids = np.asarray(tokens, dtype=np.int32)
        return (salt, _digests(ids, [len(ids)])[0]) in self._entries

    def _evict(self) -> None:
        key, evicted = self._entries.popitem(last=False)
        for part, size in evicted.parts:
            self._references[part] -= 1
            if not self._references[part]:
                del self._references[part]
                self.bytes -= size
        self._salts[key[1]].discard(key[0])
        if not self._salts[key[1]]:
            del self._salts[key[1]]
        self._evicted[key] = evicted.position
        if len(self._evicted) > MAX_EVICTED_KEYS:
            self._positions -= Counter([self._evicted.popitem(last=False)[1]])

    def _why(self, ids: np.ndarray, digests: list[bytes], salt: str) -> str:
        if any((salt, digest) in self._evicted for digest in digests):
            return "evicted"
        if any(self._salts.get(digest) for digest in digests):
            return "salt"
        mine = (snapshot.ids for (owner, _), snapshot in self._entries.items() if owner == salt)
        common = max((_common_prefix(ids, other) for other in mine), default=0)
        return f"diverged at token {common}" if common else "no checkpoint"


def restore_prefix(cache: PrefixCache, request: Request) -> None:
    """Look up the prompt of a request that is admitted: where it continues, and where it saves snapshots."""
    found = cache.find(request.prompt, request.salt)
    if isinstance(found, str):
        request.cache_miss = found
    else:
        request.offloaded, request.num_cached_tokens = found.saved, found.position
        request.num_computed_tokens, request.cache_miss = found.position, None
        request.host_pages = found.saved.pages[: found.position // CHUNK]
    positions = cache.breakpoints(len(request.prompt), request.cache_breakpoints)
    request.breakpoints = [position for position in positions if position > request.num_computed_tokens]


def _digests(ids: np.ndarray, positions: list[int]) -> list[bytes]:
    """A digest of the tokens before each of these ascending positions, in one pass over the tokens."""
    running, begin, digests = blake2b(digest_size=20), 0, []
    for position in positions:
        running.update(ids[begin:position].tobytes())
        digests.append(running.digest())
        begin = position
    return digests


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the longest common prefix."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
