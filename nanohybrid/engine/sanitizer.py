"""For debugging (NANOHYBRID_DEBUG=1, or Engine(debug=True)): what nobody holds is NaN, and who uses what is not his is stopped.

Every slot and page is known by the generation of the slot's lease that it was given with. A request that comes with an older
one, or with a page of somebody else, is a defect of the scheduler; without this it would answer from another's memory.
"""

from nanohybrid.engine.request import Request
from nanohybrid.model import HybridCache


class Guard:
    """Sees every use of slots and pages before it happens, and every return."""

    def __init__(self, state: HybridCache) -> None:
        self._state = state
        self._slots: dict[int, int] = {}  # the generation that holds it
        self._pages: dict[int, int] = {}
        state.fill(range(state.slots), range(state.pages), float("nan"))

    def given(self, request: Request, slot: int, generation: int) -> None:
        """A request begins in this slot, or is put back into it. Raises RuntimeError where somebody has it."""
        if (
            self._slots.get(slot, generation) != generation
        ):  # the same one begins again where its first step found no memory
            raise RuntimeError(
                f"slot {slot} is given to request {request.id} as lease {generation}, and lease {self._slots[slot]} holds it"
            )
        self._slots[slot] = generation
        self._state.fill([slot], (), 0.0)

    def used(self, request: Request) -> None:
        """A request is about to be computed. Raises RuntimeError where its slot or a page is not its own."""
        if request.slot is None or request.pages is None:
            raise RuntimeError(f"request {request.id} is to be computed and holds no slot")
        slot, generation = request.slot.ids[0], request.slot.generation
        if self._slots.get(slot) != generation:
            raise RuntimeError(
                f"request {request.id} comes with lease {generation} of slot {slot}; {self._slots.get(slot)} holds it"
            )
        self.pages(request, request.pages.ids, generation)

    def pages(self, request: Request, pages: tuple[int, ...], generation: int) -> None:
        """These pages are a request's; those that it did not have are zeroed."""
        fresh = [page for page in pages if page not in self._pages]
        self._pages.update(dict.fromkeys(fresh, generation))
        for page in pages:
            if self._pages[page] != generation:
                raise RuntimeError(
                    f"request {request.id} comes with page {page}, which lease {self._pages[page]} of a slot holds"
                )
        self._state.fill((), fresh, 0.0)

    def freed(self, slot: int, pages: tuple[int, ...]) -> None:
        """Nobody holds these any more."""
        self._slots.pop(slot, None)
        for page in pages:
            self._pages.pop(page, None)
        self._state.fill([slot], pages, float("nan"))
