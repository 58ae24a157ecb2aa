import pytest
from engine_helpers import NoTextTokenizer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nanohybrid.engine.block_manager import PagePool, SlotPool
from nanohybrid.engine.params import SamplingParams
from nanohybrid.engine.request import Request
from nanohybrid.engine.scheduler import Scheduler
from nanohybrid.errors import InputError
from nanohybrid.ops.sizes import CHUNK


def request(number, length, max_tokens):
    return Request(number, [7] * length, SamplingParams(max_tokens=max_tokens), NoTextTokenizer(), seed=0)


class Schedules(RuleBasedStateMachine):
    """Requests arrive, run and end in any order, with pools that are too small for all of them."""

    @initialize(slots=st.integers(1, 5), pages=st.integers(4, 12), budget=st.integers(1, 700))
    def begin(self, slots, pages, budget):
        self.scheduler = Scheduler(
            SlotPool(slots),
            PagePool(pages),
            page_size=128,
            max_model_len=4 * 128,
            max_num_batched_tokens=budget,
        )
        self.alive, self.admitted, self.count = [], [], 0

    @rule(length=st.integers(1, 480), max_tokens=st.integers(1, 30))
    def add(self, length, max_tokens):
        self.alive.append(request(self.count, length, max_tokens))
        self.scheduler.add(self.alive[-1])
        self.count += 1

    @rule(data=st.data())
    def cancel(self, data):
        if self.alive:
            gone = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
            gone.cancelled = True
            self.scheduler.remove(gone)

    @rule()
    def step(self):
        work = self.scheduler.schedule()
        assert bool(work) == bool(self.alive)
        assert sum(length for _, _, length in work) <= self.scheduler.max_num_batched_tokens
        assert len({r.id for r, _, _ in work}) == len(work)
        decoding = {
            r.id for r in self.scheduler.running.values() if r.num_tokens - r.num_computed_tokens == 1
        }
        assert decoding <= {r.id for r, _, _ in work}, "a decoding request was left out of a step"
        for r, start, length in work:
            assert start == r.num_computed_tokens and length >= 1
            assert start + length == r.num_tokens or (start + length) % CHUNK == 0
            assert len(r.pages.ids) * 128 >= start + length
            if start == 0:
                self.admitted.append(r.id)
            r.num_computed_tokens += length
            if r.num_computed_tokens == r.num_tokens and r.accept(5):
                self.alive.remove(r)
                self.scheduler.remove(r)

    @invariant()
    def first_come_first_served(self):
        assert self.admitted == sorted(self.admitted)

    @invariant()
    def pools_hold_the_running_requests(self):
        held = [page for r in self.scheduler.running.values() for page in r.pages.ids]
        assert self.scheduler.pages.num_used == len(held) == len(set(held))
        assert self.scheduler.slots.num_used == len(self.scheduler.running)

    def teardown(self):
        if hasattr(self, "scheduler"):
            for _ in range(len(self.alive) * (30 + 5) + 1):
                self.step()
            assert not self.alive, "a request starved"
            assert self.scheduler.pages.num_used == self.scheduler.slots.num_used == 0


Schedules.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestSchedules = Schedules.TestCase


def test_scheduler_refuses_a_request_that_can_never_run():
    scheduler = Scheduler(
        SlotPool(2), PagePool(3), page_size=128, max_model_len=1000, max_num_batched_tokens=256
    )
    with pytest.raises(
        InputError, match="a prompt of 990 tokens and max_tokens 20 make 1010, more than the context of 1000"
    ):
        scheduler.add(request(0, 990, 20))
    with pytest.raises(InputError, match="4 KV pages, there are 3"):
        scheduler.add(request(0, 380, 20))
    with pytest.raises(InputError, match="no tokens"):
        scheduler.add(request(0, 0, 20))


def test_scheduler_long_prompt_does_not_stop_decoding_requests():
    scheduler = Scheduler(
        SlotPool(3), PagePool(64), page_size=128, max_model_len=4096, max_num_batched_tokens=300
    )
    first, second = request(0, 5, 50), request(1, 1000, 5)
    scheduler.add(first)
    scheduler.add(second)
    lengths = []
    while second.num_computed_tokens < 1000:
        work = scheduler.schedule()
        lengths.append([length for _, _, length in work])
        for r, _, length in work:
            r.num_computed_tokens += length
            if r.num_computed_tokens == r.num_tokens:
                r.accept(3)
    assert lengths == [[5, 256], [1, 256], [1, 256], [1, 232]]
