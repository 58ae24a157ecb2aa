import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nanohybrid.engine.block_manager import PagePool, SlotPool

SIZE = 23


class Pools(RuleBasedStateMachine):
    """Leases are taken and returned in any order; a plain set of owned numbers says what must be true."""

    def __init__(self):
        super().__init__()
        self.pages, self.slots = PagePool(SIZE), SlotPool(5)
        self.held, self.slot_leases, self.returned = [], [], []

    @rule(count=st.integers(0, SIZE + 2), prefer=st.none() | st.integers(0, SIZE))
    def take_pages(self, count, prefer):
        runs, owned = self.free_runs(), {page for lease in self.held for page in lease.ids}
        wanted = set() if prefer is None else set(range(prefer, prefer + count))
        lease = self.pages.take(count, prefer=prefer)
        free = sum(runs)
        assert (lease is None) == (count > free)
        if lease is not None:
            assert len(lease.ids) == count
            assert lease.contiguous or max(runs) < count, (
                "a free run was long enough and the lease is in pieces"
            )
            if prefer is not None and not wanted & owned and max(wanted, default=0) < SIZE:
                assert set(lease.ids) == wanted, "the preferred pages were free and others were given"
            self.held.append(lease)

    def free_runs(self):
        owned = {page for lease in self.held for page in lease.ids}
        text = "".join(" " if page in owned else "f" for page in range(SIZE))
        return [len(run) for run in text.split()]

    @rule(data=st.data())
    def give_pages(self, data):
        if self.held:
            lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pages.give(lease)
            if lease.ids:
                self.returned.append((self.pages, lease))

    @rule(data=st.data(), count=st.integers(0, 6))
    def extend_pages(self, data, count):
        if self.held:
            at = data.draw(st.integers(0, len(self.held) - 1))
            old, free = self.held[at], self.pages.free
            lease = self.pages.extend(old, count)
            assert (lease is None) == (count > free)
            if lease is not None:
                assert lease.ids[: len(old.ids)] == old.ids and len(lease.ids) == len(old.ids) + count
                self.held[at] = lease
                if old.ids:
                    self.returned.append((self.pages, old))

    @rule()
    def take_slot(self):
        lease = self.slots.take()
        taken = {lease.ids[0] for lease in self.slot_leases}
        if lease is None:
            assert len(taken) == 5
        else:
            assert lease.ids[0] == min(set(range(5)) - taken)
            self.slot_leases.append(lease)

    @rule(data=st.data())
    def give_slot(self, data):
        if self.slot_leases:
            lease = self.slot_leases.pop(data.draw(st.integers(0, len(self.slot_leases) - 1)))
            self.slots.give(lease)
            self.returned.append((self.slots, lease))

    @rule(data=st.data())
    def a_second_return_is_refused(self, data):
        if self.returned:
            pool, lease = self.returned[data.draw(st.integers(0, len(self.returned) - 1))]
            with pytest.raises(RuntimeError, match="returned already"):
                pool.give(lease)

    @invariant()
    def nothing_is_lost_or_owned_twice(self):
        owned = [page for lease in self.held for page in lease.ids]
        assert len(owned) == len(set(owned)) == self.pages.used
        assert self.slots.used == len(self.slot_leases)
        assert all(self.pages.owns(lease) for lease in self.held)

    def teardown(self):
        for lease in self.held:
            self.pages.give(lease)
        assert self.pages.free == SIZE and self.pages.take(SIZE).contiguous


Pools.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestPools = Pools.TestCase
