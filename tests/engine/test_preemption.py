from dataclasses import replace

import pytest
from engine_helpers import NoTextTokenizer, random_ids
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nanohybrid.engine.block_manager import PagePool, SlotPool
from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams
from nanohybrid.engine.request import Request
from nanohybrid.engine.scheduler import Scheduler, Swap
from nanohybrid.ops.sizes import CHUNK

PAGE = 16


class Memory(RuleBasedStateMachine):
    """The scheduler over a model of the cache: dictionaries that record which request wrote what.

    A slot holds (request, computed tokens); a page holds (request, position) of each token written to it.
    """

    @initialize(
        slots=st.integers(1, 4),
        pages=st.integers(10, 24),
        budget=st.integers(1, 300),
        overcommit=st.booleans(),
        drafts=st.integers(0, 9),
    )
    def begin(self, slots, pages, budget, overcommit, drafts):
        pools = SlotPool(slots), PagePool(pages)
        self.scheduler = Scheduler(
            *pools,
            page_size=PAGE,
            max_model_len=10 * PAGE,
            max_num_batched_tokens=budget,
            overcommit=overcommit,
        )
        self.scheduler.propose = (lambda _, limit: [6] * min(limit, drafts)) if drafts else None
        self.slots, self.pages = {}, {}
        self.alive, self.count, self.begun = [], 0, []

    @rule(length=st.integers(1, 130), max_tokens=st.integers(1, 30))
    def add(self, length, max_tokens):
        request = Request(
            self.count, [7] * length, SamplingParams(max_tokens=max_tokens), NoTextTokenizer(), seed=0
        )
        self.scheduler.add(request)
        self.alive.append(request)
        self.count += 1

    @rule(data=st.data())
    def cancel(self, data):
        if self.alive:
            gone = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
            gone.cancelled = True
            self.scheduler.remove(gone)

    @rule(data=st.data())
    def preempt(self, data):
        running = list(self.scheduler.running.values())
        if running:
            self.scheduler.preempt(running[data.draw(st.integers(0, len(running) - 1))])

    @rule(data=st.data())
    def fork(self, data):
        begun = [
            r
            for r in self.scheduler.running.values()
            if r.num_computed_tokens and r.num_computed_tokens == r.num_tokens - 1
        ]
        if begun:
            first = begun[data.draw(st.integers(0, len(begun) - 1))]
            other = Request(self.count, first.prompt, first.params, NoTextTokenizer(), seed=0)
            other.tokens, other.num_tokens, other.num_computed_tokens = (
                list(first.tokens),
                first.num_tokens,
                first.num_computed_tokens,
            )
            other.offloaded = self.copied(first.slot.ids[0], first.pages.ids, first.num_computed_tokens)
            self.scheduler.resume([other])
            self.alive.append(other)
            self.count += 1

    def copied(self, slot, pages, computed):
        return self.slots[slot], [dict(self.pages.get(page, {})) for page in pages[: -(-computed // PAGE)]]

    def move(self):
        for request, slot, pages, to_host in self.scheduler.swaps:
            if to_host:
                request.offloaded = self.copied(slot, pages, request.num_computed_tokens)
            else:
                self.slots[slot] = request.offloaded[0]
                self.pages.update(
                    {
                        page: dict(pages_of_request)
                        for page, pages_of_request in zip(pages, request.offloaded[1], strict=False)
                    }
                )
                request.offloaded = None
        self.scheduler.swaps.clear()

    @rule()
    def step(self):
        work = self.scheduler.schedule()
        self.move()
        assert bool(work) == bool(self.alive)
        assert sum(length for _, _, length in work) <= self.scheduler.max_num_batched_tokens
        decoding = {
            r.id for r in self.scheduler.running.values() if r.num_tokens - r.num_computed_tokens == 1
        }
        assert decoding <= {r.id for r, _, _ in work}, "a decoding request was left out of a step"
        for r, start, length in work:
            drafted = len(r.draft)
            assert start == r.num_computed_tokens and (
                start + length - drafted == r.num_tokens or (start + length) % CHUNK == 0
            )
            assert not drafted or (r.num_tokens + drafted < r.max_total_tokens and r.num_tokens - start == 1)
            if start:
                assert self.slots[r.slot.ids[0]][1] == start, (
                    "the slot holds another length or another request's state"
                )
                self.owned(r, start)
            stay = self.count % (drafted + 1)  # so many of the draft are what it says
            self.slots[r.slot.ids[0]] = (r.id, start + length - drafted + stay)
            for position in range(start, start + length):
                self.pages.setdefault(r.pages.ids[position // PAGE], {})[position % PAGE] = (r.id, position)
            r.num_computed_tokens += length - drafted + stay
            ended = False
            for _ in range(stay + 1 if r.num_computed_tokens >= r.num_tokens else 0):
                ended = r.accept(5)
            r.draft = []
            if ended:
                self.alive.remove(r)
                self.scheduler.remove(r)

    def owned(self, r, computed):
        """Every earlier token is where the request's pages say; its group may have written it."""
        for position in range(computed):
            assert self.pages[r.pages.ids[position // PAGE]][position % PAGE][1] == position

    @invariant()
    def no_page_or_request_is_lost_or_owned_twice(self):
        if hasattr(self, "scheduler"):
            scheduler = self.scheduler
            held = [page for r in scheduler.running.values() for page in r.pages.ids]
            assert scheduler.pages.num_used == len(held) == len(set(held))
            assert scheduler.slots.num_used == len(scheduler.running)
            known = [*scheduler.waiting, *scheduler.running.values()]
            assert sorted(r.id for r in known) == sorted(r.id for r in self.alive)
            order = [r.id for r in scheduler.waiting if r.num_computed_tokens]
            assert order == sorted(order) and all(
                r.num_computed_tokens for r in list(scheduler.waiting)[: len(order)]
            )

    def teardown(self):
        if hasattr(self, "scheduler"):
            for _ in range(len(self.alive) * 60 + 1):
                self.step()
            assert not self.alive, "a request starved"
            assert self.scheduler.pages.num_used == self.scheduler.slots.num_used == 0


Memory.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMemory = Memory.TestCase

PARAMS = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=3, logprobs=True)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 300])
def test_preempted_request_continues_bit_for_bit_in_another_slot(model, tokenizer, length):
    engine = Engine(model, tokenizer, max_num_seqs=3, max_model_len=400, max_num_batched_tokens=140)
    wanted = engine.generate([random_ids(length)], PARAMS)[0]
    request = engine.add(random_ids(length), PARAMS)
    places, count = set(), 0
    while not request.finished:
        engine.step()
        count += 1
        if count % 3 == 0 and not request.finished:
            engine.scheduler.preempt(request)
            blockers = (
                [engine.scheduler.slots.allocate() for _ in range(count % 2)],
                [engine.scheduler.pages.allocate(count % 5)],
            )
            poison(engine)
            engine.step()
            places.add((request.slot.ids, request.pages.ids) if request.slot else None)
            for pool, allocations in zip(
                (engine.scheduler.slots, engine.scheduler.pages), blockers, strict=True
            ):
                for allocation in allocations:
                    pool.free(allocation)
    assert request.completion() == wanted and len(places) > 3


def poison(engine):
    """Overwrite all slots and pages but those that still have to be copied to host memory."""
    saving = {
        (move.slot, move.pages) for move in engine.scheduler.swaps if isinstance(move, Swap) and move.to_host
    }
    slots, pages = {slot for slot, _ in saving}, {page for _, held in saving for page in held}
    for pool in engine.runner.state.slot_pools:
        for slot in set(range(len(pool))) - slots:
            pool[slot] = 1e4
    for pool in engine.runner.state.page_pools:
        for page in set(range(len(pool))) - pages:
            pool[page] = 1e4


def test_overcommit_preempts_and_changes_no_text(model, tokenizer):
    texts = [random_ids(length, seed) for seed, length in enumerate((120, 100, 125, 5, 127))]
    params = [replace(PARAMS, seed=seed, max_tokens=150) for seed in range(5)]
    wanted = Engine(model, tokenizer, max_num_seqs=6, max_model_len=400).generate(texts, params)
    engine = Engine(model, tokenizer, max_num_seqs=6, max_model_len=400, num_kv_pages=8, overcommit=True)
    got = engine.generate(texts, params)
    assert engine.scheduler.num_preemptions > 0
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.logprobs == pytest.approx(
            theirs.logprobs, abs=1e-4
        )
    assert (
        engine.scheduler.pages.num_used == engine.scheduler.slots.num_used == 0 and not engine.scheduler.swaps
    )


def test_n_completions_survive_preemption(model, tokenizer):
    params = replace(PARAMS, n=4, max_tokens=150)
    wanted = Engine(model, tokenizer, max_num_seqs=5, max_model_len=400).generate([random_ids(120)], params)
    engine = Engine(model, tokenizer, max_num_seqs=4, max_model_len=400, num_kv_pages=7, overcommit=True)
    assert [c.token_ids for c in engine.generate([random_ids(120)], params)] == [c.token_ids for c in wanted]
    assert engine.scheduler.num_preemptions > 0
