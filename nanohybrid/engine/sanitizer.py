"""A sanitizer of the cache, for debugging (NANOHYBRID_DEBUG=1 or `Engine(debug=True)`).

Slots and pages that no request holds are filled with NaN, and each use is checked. A request that comes with
an older allocation of its slot, or with a page of another request, is a defect of the scheduler; without this
check it would answer from another request's memory.
"""

from nanohybrid.engine.request import Request
from nanohybrid.model import HybridCache


class CacheSanitizer:
    """Is told of every allocation, use and release of slots and pages, before it happens.

    A slot or page is identified by the generation of the slot's allocation. All methods but `on_free` raise
    RuntimeError where another request holds what is used.
    """

    def __init__(self, state: HybridCache) -> None:
        self._state = state
        self._slots: dict[int, int] = {}  # the generation that holds each slot
        self._pages: dict[int, int] = {}
        state.fill(range(state.slots), range(state.pages), float("nan"))

    def on_alloc(self, request: Request, slot: int, generation: int) -> None:
        """A request begins in this slot, or is swapped into it: the slot is zeroed.

        The same allocation may begin twice, where its first step ran out of memory.
        """
        if self._slots.get(slot, generation) != generation:
            raise RuntimeError(
                f"slot {slot} is allocated to request {request.id} as allocation {generation}, "
                f"but allocation {self._slots[slot]} holds it"
            )
        self._slots[slot] = generation
        self._state.fill([slot], (), 0.0)

    def on_use(self, request: Request) -> None:
        """A step is about to compute this request."""
        if request.slot is None or request.pages is None:
            raise RuntimeError(f"request {request.id} is to be computed and holds no slot")
        slot, generation = request.slot.ids[0], request.slot.generation
        if self._slots.get(slot) != generation:
            raise RuntimeError(
                f"request {request.id} uses allocation {generation} of slot {slot}; "
                f"{self._slots.get(slot)} holds it"
            )
        self.on_use_pages(request, request.pages.ids, generation)

    def on_use_pages(self, request: Request, pages: tuple[int, ...], generation: int) -> None:
        """A request uses these pages; those that are new to it are zeroed."""
        fresh = [page for page in pages if page not in self._pages]
        self._pages.update(dict.fromkeys(fresh, generation))
        for page in pages:
            if self._pages[page] != generation:
                raise RuntimeError(
                    f"request {request.id} uses page {page}, "
                    f"which belongs to allocation {self._pages[page]} of a slot"
                )
        self._state.fill((), fresh, 0.0)

    def on_free(self, slot: int, pages: tuple[int, ...]) -> None:
        """No request holds these any more: they are filled with NaN."""
        self._slots.pop(slot, None)
        for page in pages:
            self._pages.pop(page, None)
        self._state.fill([slot], pages, float("nan"))
