"""Which tokens of which requests the next step computes. Plain Python, no torch: policy over plain data.

A step has one budget of tokens. Requests that decode (one token each) come first, then prompts in the order
of their arrival, then new requests. A new request is admitted where a slot is free and all pages that it can
ever
need: a running request never runs out of pages. First come, first served: no request overtakes the head of
    the queue.

With `overcommit` a request is admitted with the pages of its prompt, and more are allocated as it grows.
Where
none is free, the youngest running request is preempted: its state and pages are swapped out to host memory,
    and it is swapped in again before any new request is admitted. Nothing is recomputed, since the chunked
    scan of a prompt and the single steps that wrote an answer round differently.

A prompt is cut at multiples of 128 from its start, where the Mamba scan has its chunk boundaries: the same
    sums are then computed in the same order wherever it is cut. It is also cut at its cache breakpoints,
    where the prefix cache saves a snapshot.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from nanohybrid.engine.block_manager import Allocation, PagePool, SlotPool
from nanohybrid.engine.request import Request
from nanohybrid.errors import InputError
from nanohybrid.ops.sizes import CHUNK


class Work(NamedTuple):
    """`length` tokens of one request from position `start` on, its draft last.

    The next token is sampled where no known token is left after them.
    """

    request: Request
    start: int
    length: int


class Swap(NamedTuple):
    """Copy the state and pages of a request to host memory, or back.

    Swaps are done in order, before the work.

    They hold numbers, not allocations: when the copy is made, the slot of a preempted request may already
        have its next owner.
    """

    request: Request
    slot: int
    pages: tuple[int, ...]
    to_host: bool


class Freed(NamedTuple):
    """No request holds this slot and these pages once the swaps before it are done.

    Only with `report_freed`.
    """

    slot: int
    pages: tuple[int, ...]


class Scheduler:
    """The requests that wait and the requests that run, and the two pools that they share.

    max_model_len: tokens of the longest sequence. max_num_batched_tokens: tokens of a step; raised to
    slots + 128, so that all requests may decode while one prompt still advances.
    """

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
        self.max_num_batched_tokens = max(max_num_batched_tokens, slots.size + CHUNK)
        self.overcommit = overcommit
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.swaps: list[Swap | Freed] = []  # done by the engine before it runs what `schedule` returned
        self.num_preemptions, self.num_budget_cuts = 0, 0
        # May find a snapshot of the beginning of a prompt in the prefix cache.
        self.on_admit: Callable[[Request], None] | None = None
        # May draft at most so many tokens for a request that decodes.
        self.propose: Callable[[Request, int], list[int]] | None = None
        self.report_freed = False
        self._by_slot: list[Request] = []  # the running requests in the order of their slots
        self._pages_per_slot = pages.size // max(slots.size, 1)  # a request prefers the pages of its slot

    def add(self, request: Request) -> None:
        """Queue a request. Raises InputError where it could never run."""
        total, needed = request.max_total_tokens, self._max_pages(request)
        size = f"a prompt of {len(request.prompt)} tokens and max_tokens {request.params.max_tokens}"
        if not request.prompt:
            raise InputError("the prompt has no tokens; give it at least the BOS token <s>")
        if total > self.max_model_len:
            raise InputError(
                f"{size} make {total}, more than the context of {self.max_model_len}; "
                "shorten one or raise max_model_len"
            )
        if needed > self.pages.size:
            raise InputError(
                f"{size} need {needed} KV pages, there are {self.pages.size}; "
                "shorten one or raise num_kv_pages"
            )
        self.waiting.append(request)

    def schedule(self) -> list[Work]:
        """The work of the next step; empty only when no request waits or runs."""
        out_of_pages = self.overcommit and not self._allocate_pages()
        work = [
            Work(request, request.num_computed_tokens, 1)
            for request in self._by_slot
            if request.num_tokens - request.num_computed_tokens == 1
        ]
        decoding = len(work)
        left = self.max_num_batched_tokens - decoding
        if len(work) < len(self.running):
            for request in self.running.values():
                if request.num_tokens - request.num_computed_tokens > 1:
                    left -= self._schedule_prompt(request, left, work)
        while self.waiting and left > 0 and not out_of_pages and self._admit(self.waiting[0], left):
            left -= self._schedule_prompt(self.waiting.popleft(), left, work)
        if self.propose is not None:
            for index in range(decoding):
                left -= self._add_draft(index, left, work)
        return work

    def lower_token_budget(self) -> bool:
        """Halve the token budget for good, after memory ran out. False where it cannot be smaller."""
        smaller = max(self.max_num_batched_tokens // 2, self.slots.size + CHUNK)
        lowered, self.max_num_batched_tokens = smaller < self.max_num_batched_tokens, smaller
        self.num_budget_cuts += lowered
        return lowered

    def remove(self, request: Request) -> None:
        """Remove a finished or cancelled request, whether it waits or runs, and free what it holds."""
        request.offloaded = None
        if request.slot is None or request.pages is None:
            self.waiting.remove(request)
        else:
            self._free(request, request.slot, request.pages)

    def clear(self) -> list[tuple[int, ...]]:
        """Cancel every request and make both pools anew, in whatever state a step that raised left them.

        Returns the pages that each running request held.
        """
        held = [request.pages.ids for request in self.running.values() if request.pages is not None]
        for request in (*self.waiting, *self.running.values()):
            for member in request.group or [request]:
                member.cancelled = True
                member.slot = member.pages = member.offloaded = None
        self.waiting.clear()
        self.running.clear()
        self.swaps.clear()
        self._by_slot = []
        self.slots, self.pages = SlotPool(self.slots.size), PagePool(self.pages.size)
        return held

    def preempt(self, request: Request) -> None:
        """Swap a running request out to host memory; its slot and pages are free at once."""
        if request.slot is None or request.pages is None:
            raise RuntimeError(f"request {request.id} does not run")
        self.swaps.append(Swap(request, request.slot.ids[0], request.pages.ids, to_host=True))
        self._free(request, request.slot, request.pages)
        self.resume([request])
        self.num_preemptions += 1

    def resume(self, requests: Iterable[Request]) -> None:
        """Queue requests that have begun before all that have not, in the order of their ids."""
        begun = []
        while self.waiting and self.waiting[0].num_computed_tokens:
            begun.append(self.waiting.popleft())
        self.waiting.extendleft(sorted([*begun, *requests], key=lambda request: -request.id))

    def hand_over(self, request: Request, successor: Request) -> None:
        """Let `successor` continue in place of `request`, with all that it holds and has computed."""
        successor.slot, successor.pages = request.slot, request.pages
        successor.num_computed_tokens, successor.offloaded = request.num_computed_tokens, request.offloaded
        successor.breakpoints, successor.host_pages = request.breakpoints, request.host_pages
        successor.num_cached_tokens, successor.cache_miss = request.num_cached_tokens, request.cache_miss
        if request.slot is None:  # it waits, or it was preempted and its state may still have to be copied
            self.swaps[:] = [
                swap._replace(request=successor)
                if isinstance(swap, Swap) and swap.request is request
                else swap
                for swap in self.swaps
            ]
            self.waiting[self.waiting.index(request)] = successor
            return
        request.slot = request.pages = None
        running = [successor if other is request else other for other in self.running.values()]
        self.running = {other.id: other for other in running}
        self._sort_by_slot()

    def _schedule_prompt(self, request: Request, left: int, work: list[Work]) -> int:
        """Schedule as much of this prompt as `left` tokens allow; returns how many tokens that is."""
        start, end = request.num_computed_tokens, request.num_tokens
        if end - start > left:
            end = (start + left) // CHUNK * CHUNK
        if request.breakpoints and start < request.breakpoints[-1] < end:
            end = request.breakpoints[-1]
        if end <= start:
            return 0
        work.append(Work(request, start, end - start))
        return end - start

    def _add_draft(self, index: int, left: int, work: list[Work]) -> int:
        """Draft tokens for a request that decodes; returns how many.

        A draft fits in the pages that the request has, and is no longer than its answer may be. There is none
        in the step that completes the prompt, whose state other requests of the group may need.
        """
        request, start, _ = work[index]
        pages = len(request.pages.ids) if request.pages else 0
        in_pages = pages * self.page_size - request.num_tokens
        in_answer = request.max_total_tokens - request.num_tokens - 1
        if self.propose is not None and request.tokens:
            request.draft = self.propose(request, max(min(left, in_pages, in_answer), 0))
        work[index] = Work(request, start, 1 + len(request.draft))
        return len(request.draft)

    def _admit(self, request: Request, left: int) -> bool:
        """Allocate a slot and pages to a request; False where they are not free.

        Also False where `left` tokens do not suffice for the first chunk of its prompt. With overcommit, one
        page stays free for each request that runs.
        """
        needed, spare = self._max_pages(request), 0
        if self.overcommit:
            needed, spare = -(-request.num_tokens // self.page_size), len(self.running)
        first = min(request.num_tokens - request.num_computed_tokens, CHUNK)
        if not self.slots.num_free or self.pages.num_free < needed + spare or left < first:
            return False
        if not request.num_computed_tokens and self.on_admit is not None and request.scores is None:
            self.on_admit(request)
        request.slot = slot = self.slots.allocate()
        if slot is None:
            raise RuntimeError("the slot pool counts a free slot that it does not have")
        request.pages = pages = self.pages.allocate(needed, prefer=slot.ids[0] * self._pages_per_slot)
        if pages is None:
            raise RuntimeError("the page pool counts free pages that it does not have")
        self.running[request.id] = request
        if request.num_computed_tokens:
            self.swaps.append(Swap(request, slot.ids[0], pages.ids, to_host=False))
        self._sort_by_slot()
        return True

    def _free(self, request: Request, slot: Allocation, pages: Allocation) -> None:
        del self.running[request.id]
        self.slots.free(slot)
        self.pages.free(pages)
        if self.report_freed:
            self.swaps.append(Freed(slot.ids[0], pages.ids))
        request.slot = request.pages = None
        self._sort_by_slot()

    def _allocate_pages(self) -> bool:
        """Allocate the pages of its known tokens to every running request, the oldest first.

        False where a request had to be preempted for that.
        """
        before = self.num_preemptions
        for request in sorted(self.running.values(), key=lambda request: request.id):
            while request.pages is not None:  # until the request itself is preempted
                missing = -(-request.num_tokens // self.page_size) - len(request.pages.ids)
                if missing <= 0:
                    break
                longer = self.pages.extend(request.pages, missing)
                if longer is not None:
                    request.pages = longer
                    break
                self.preempt(self.running[max(self.running)])
        return self.num_preemptions == before

    def _sort_by_slot(self) -> None:
        self._by_slot = sorted(
            self.running.values(), key=lambda request: request.slot.ids[0] if request.slot else -1
        )

    def _max_pages(self, request: Request) -> int:
        return -(-request.max_total_tokens // self.page_size)
