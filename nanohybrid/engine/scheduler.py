"""Which tokens of which requests run in the next step. Plain Python, no torch: policy over plain data.

One budget of tokens a step. Requests that need one token (decoding) come first, then prompts in the order of arrival,
then new requests while a slot and all the pages that they can ever need are free: a running request never runs out.
Where pages are overcommitted, a request is admitted with the pages of what it has, and takes more as it grows; where none
is free then, the youngest request is put aside, its state and pages copied to host memory, to go on from there before any
new one is admitted. Nothing is computed twice: the scan of a prompt and the steps that wrote an answer round differently.
A prompt is cut at multiples of 128 from its start, where the Mamba scan has its chunk boundaries, so that the same sums
are made in the same order however it was cut; and where it shall leave a checkpoint for the prefix cache. First come, first
served: nothing overtakes the head of the queue.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from nanohybrid.engine.block_manager import Lease, PagePool, SlotPool
from nanohybrid.engine.request import Request
from nanohybrid.errors import InputError
from nanohybrid.ops.sizes import CHUNK


class Work(NamedTuple):
    """`length` tokens of one request from position `start`, its draft last; its next token is wanted if none that is known is left."""

    request: Request
    start: int
    length: int


class Move(NamedTuple):
    """Copy what a request has computed between the device and the host; to be done in order, before the step's work.

    Ids, not leases: when the copy is made, the lease of a request that was put aside may have its next owner already.
    """

    request: Request
    slot: int
    pages: tuple[int, ...]
    to_host: bool


class Freed(NamedTuple):
    """Nobody holds these any more, once the moves before this one are made. Told only where `tell_freed`."""

    slot: int
    pages: tuple[int, ...]


class Scheduler:
    """Requests that wait and requests that run, over two pools."""

    def __init__(
        self,
        slots: SlotPool,
        pages: PagePool,
        *,
        page_size: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        overcommit: bool = False,
    ) -> None:
        self.slots, self.pages = slots, pages
        self.page_size, self.max_model_len = page_size, max_model_len
        self.max_num_batched_tokens = max(
            max_num_batched_tokens, slots.size + CHUNK
        )  # all may decode and one prompt still goes on
        self.overcommit = overcommit
        self.on_admit: Callable[[Request], None] | None = (
            None  # may find a beginning of the prompt in host memory
        )
        self.propose: Callable[[Request, int], list[int]] | None = (
            None  # may draft so many tokens for one that decodes
        )
        self.preemptions, self.shrunk = 0, 0
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.tell_freed = False
        self.moves: list[
            Move | Freed
        ] = []  # the engine makes these copies before it runs what `schedule` returned
        self._by_slot: list[
            Request
        ] = []  # the running ones in the order of their slots, in which the pools can be viewed
        self._home = pages.size // max(
            slots.size, 1
        )  # a slot's own stretch of pages, taken where free: evenly spaced ones too

    def add(self, request: Request) -> None:
        """Queue a request. Raises InputError where it could never run."""
        most = request.most_tokens
        size = f"a prompt of {len(request.prompt)} tokens and max_tokens {request.params.max_tokens}"
        if not request.prompt:
            raise InputError("the prompt has no tokens; give it at least the BOS token <s>")
        if most > self.max_model_len:
            raise InputError(
                f"{size} make {most}, more than the context of {self.max_model_len}; shorten one or raise max_model_len"
            )
        if self._pages(request) > self.pages.size:
            raise InputError(
                f"{size} need {self._pages(request)} KV pages, there are {self.pages.size}; shorten one or raise num_kv_pages"
            )
        self.waiting.append(request)

    def schedule(self) -> list[Work]:
        """The work of the next step; empty only when nothing waits and nothing runs."""
        crowded = self.overcommit and not self._grow()
        work = [Work(r, r.computed, 1) for r in self._by_slot if r.known - r.computed == 1]
        decoding = len(work)
        left = self.max_num_batched_tokens - decoding
        if len(work) < len(self.running):
            for request in self.running.values():
                if request.known - request.computed > 1:
                    left -= self._cut(request, left, work)
        while self.waiting and left > 0 and not crowded and self._admit(self.waiting[0], left):
            left -= self._cut(self.waiting.popleft(), left, work)
        if self.propose is not None:
            for index in range(decoding):
                left -= self._lengthen(index, left, work)
        return work

    def shrink(self) -> bool:
        """Halve the budget of tokens, for good: memory for a step was not to be had. False where it can be no smaller."""
        smaller = max(self.max_num_batched_tokens // 2, self.slots.size + CHUNK)
        fell, self.max_num_batched_tokens = smaller < self.max_num_batched_tokens, smaller
        self.shrunk += fell
        return fell

    def remove(self, request: Request) -> None:
        """Take a finished or cancelled request out, wherever it is, and give back what it holds."""
        request.saved = None
        if request.slot is None or request.pages is None:
            self.waiting.remove(request)
        else:
            self._give_back(request, request.slot, request.pages)

    def clear(self) -> list[tuple[int, ...]]:
        """Forget every request and make both pools anew, whatever state a step that raised left them in.

        Returns the pages that each running request held. The requests count as cancelled.
        """
        held = [request.pages.ids for request in self.running.values() if request.pages is not None]
        for request in (*self.waiting, *self.running.values()):
            for member in request.family or [request]:
                member.cancelled = True
                member.slot = member.pages = member.saved = None
        self.waiting.clear()
        self.running.clear()
        self.moves.clear()
        self._by_slot = []
        self.slots, self.pages = SlotPool(self.slots.size), PagePool(self.pages.size)
        return held

    def preempt(self, request: Request) -> None:
        """Put a running request aside: its state goes to host memory, its slot and pages are free at once."""
        if request.slot is None or request.pages is None:
            raise RuntimeError(f"request {request.id} does not run")
        self.moves.append(Move(request, request.slot.ids[0], request.pages.ids, to_host=True))
        self._give_back(request, request.slot, request.pages)
        self.resume([request])
        self.preemptions += 1

    def resume(self, requests: Iterable[Request]) -> None:
        """Put requests that have begun before all that have not, in the order of their ids."""
        begun = []
        while self.waiting and self.waiting[0].computed:
            begun.append(self.waiting.popleft())
        self.waiting.extendleft(sorted([*begun, *requests], key=lambda request: -request.id))

    def replace(self, request: Request, heir: Request) -> None:
        """Let another request go on in this one's place, with all that it holds and has computed."""
        heir.slot, heir.pages, heir.computed, heir.saved = (
            request.slot,
            request.pages,
            request.computed,
            request.saved,
        )
        heir.stops, heir.kept, heir.cached, heir.cache_miss = (
            request.stops,
            request.kept,
            request.cached,
            request.cache_miss,
        )
        if (
            request.slot is None
        ):  # put aside, perhaps just now, when the copy of its state is still to be made
            self.moves[:] = [
                m._replace(request=heir) if isinstance(m, Move) and m.request is request else m
                for m in self.moves
            ]
            self.waiting[self.waiting.index(request)] = heir
            return
        request.slot = request.pages = None
        self.running = {r.id: r for r in (heir if r is request else r for r in self.running.values())}
        self._sort()

    def _cut(self, request: Request, left: int, work: list[Work]) -> int:
        """Add as much of this prompt as `left` tokens allow; returns how much that was."""
        start, end = request.computed, request.known
        if end - start > left:
            end = (start + left) // CHUNK * CHUNK
        if request.stops and start < request.stops[-1] < end:
            end = request.stops[-1]
        if end <= start:
            return 0
        work.append(Work(request, start, end - start))
        return end - start

    def _lengthen(self, index: int, left: int, work: list[Work]) -> int:
        """Let a request that decodes be computed beyond its known tokens, by a draft; returns of how many tokens.

        Prompts come first. A draft takes no page that the request does not have, and reaches no further than its answer may.
        """
        request, start, _ = work[index]
        pages = len(request.pages.ids) if request.pages else 0
        room = min(left, pages * self.page_size - request.known, request.most_tokens - request.known - 1)
        if (
            self.propose is not None and request.tokens
        ):  # not while a prompt ends, whose state others may want
            request.draft = self.propose(request, max(room, 0))
        work[index] = Work(request, start, 1 + len(request.draft))
        return len(request.draft)

    def _admit(self, request: Request, left: int) -> bool:
        """Give it a slot and its pages if all are free and the budget holds a first piece of it."""
        needed = self._pages(request)
        spare = 0
        if self.overcommit:
            needed, spare = (
                -(-request.known // self.page_size),
                len(self.running),
            )  # a page for each of them to grow into
        if (
            not self.slots.free
            or self.pages.free < needed + spare
            or left < min(request.known - request.computed, CHUNK)
        ):
            return False
        if not request.computed and self.on_admit is not None and request.scores is None:
            self.on_admit(request)
        request.slot = slot = self.slots.take()
        if slot is None:
            raise RuntimeError("the slot pool counts a free slot that it does not have")
        request.pages = pages = self.pages.take(needed, prefer=slot.ids[0] * self._home)
        if pages is None:
            raise RuntimeError("the page pool counts free pages that it does not have")
        self.running[request.id] = request
        if request.computed:
            self.moves.append(Move(request, slot.ids[0], pages.ids, to_host=False))
        self._sort()
        return True

    def _give_back(self, request: Request, slot: Lease, pages: Lease) -> None:
        del self.running[request.id]
        self.slots.give(slot)
        self.pages.give(pages)
        if self.tell_freed:
            self.moves.append(Freed(slot.ids[0], pages.ids))
        request.slot = request.pages = None
        self._sort()

    def _grow(self) -> bool:
        """Give every running request the pages of its known tokens, the oldest first; whether that put nobody aside."""
        before = self.preemptions
        for request in sorted(self.running.values(), key=lambda request: request.id):
            while request.pages is not None:  # until it is put aside itself
                missing = -(-request.known // self.page_size) - len(request.pages.ids)
                if missing <= 0:
                    break
                longer = self.pages.extend(request.pages, missing)
                if longer is not None:
                    request.pages = longer
                    break
                self.preempt(self.running[max(self.running)])
        return self.preemptions == before

    def _sort(self) -> None:
        self._by_slot = sorted(
            self.running.values(), key=lambda request: request.slot.ids[0] if request.slot else -1
        )

    def _pages(self, request: Request) -> int:
        return -(-request.most_tokens // self.page_size)
