import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nanohybrid.engine.block_manager import PagePool, SlotPool

SIZE = 23


class Pools(RuleBasedStateMachine):
    """Slots and pages are allocated and freed in any order; a set of owned numbers is the reference."""

    def __init__(self):
        super().__init__()
        self.pages, self.slots = PagePool(SIZE), SlotPool(5)
        self.held, self.slot_allocations, self.returned = [], [], []

    @rule(count=st.integers(0, SIZE + 2), prefer=st.none() | st.integers(0, SIZE))
    def allocate_pages(self, count, prefer):
        runs, owned = self.free_runs(), {page for allocation in self.held for page in allocation.ids}
        wanted = set() if prefer is None else set(range(prefer, prefer + count))
        allocation = self.pages.allocate(count, prefer=prefer)
        free = sum(runs)
        assert (allocation is None) == (count > free)
        if allocation is not None:
            assert len(allocation.ids) == count
            assert allocation.contiguous or max(runs) < count, (
                "a free run was long enough, but the pages are not contiguous"
            )
            if prefer is not None and not wanted & owned and max(wanted, default=0) < SIZE:
                assert set(allocation.ids) == wanted, (
                    "the preferred pages were free, but others were allocated"
                )
            self.held.append(allocation)

    def free_runs(self):
        owned = {page for allocation in self.held for page in allocation.ids}
        text = "".join(" " if page in owned else "f" for page in range(SIZE))
        return [len(run) for run in text.split()]

    @rule(data=st.data())
    def free_pages(self, data):
        if self.held:
            allocation = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pages.free(allocation)
            if allocation.ids:
                self.returned.append((self.pages, allocation))

    @rule(data=st.data(), count=st.integers(0, 6))
    def extend_pages(self, data, count):
        if self.held:
            at = data.draw(st.integers(0, len(self.held) - 1))
            old, free = self.held[at], self.pages.num_free
            allocation = self.pages.extend(old, count)
            assert (allocation is None) == (count > free)
            if allocation is not None:
                assert (
                    allocation.ids[: len(old.ids)] == old.ids and len(allocation.ids) == len(old.ids) + count
                )
                self.held[at] = allocation
                if old.ids:
                    self.returned.append((self.pages, old))

    @rule()
    def allocate_slot(self):
        allocation = self.slots.allocate()
        taken = {allocation.ids[0] for allocation in self.slot_allocations}
        if allocation is None:
            assert len(taken) == 5
        else:
            assert allocation.ids[0] == min(set(range(5)) - taken)
            self.slot_allocations.append(allocation)

    @rule(data=st.data())
    def free_slot(self, data):
        if self.slot_allocations:
            allocation = self.slot_allocations.pop(data.draw(st.integers(0, len(self.slot_allocations) - 1)))
            self.slots.free(allocation)
            self.returned.append((self.slots, allocation))

    @rule(data=st.data())
    def freeing_twice_raises(self, data):
        if self.returned:
            pool, allocation = self.returned[data.draw(st.integers(0, len(self.returned) - 1))]
            with pytest.raises(RuntimeError, match="freed already"):
                pool.free(allocation)

    @invariant()
    def no_number_is_lost_or_owned_twice(self):
        owned = [page for allocation in self.held for page in allocation.ids]
        assert len(owned) == len(set(owned)) == self.pages.num_used
        assert self.slots.num_used == len(self.slot_allocations)
        assert all(self.pages.owns(allocation) for allocation in self.held)

    def teardown(self):
        for allocation in self.held:
            self.pages.free(allocation)
        assert self.pages.num_free == SIZE and self.pages.allocate(SIZE).contiguous


Pools.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestPools = Pools.TestCase
