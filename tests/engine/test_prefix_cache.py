from collections import OrderedDict
from dataclasses import replace

import pytest
from engine_helpers import random_ids
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams
from nanohybrid.engine.prefix_cache import PrefixCache, Snapshot

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0, seed=3, logprobs=True)
MIB = 2**20


def engine(model, tokenizer, cache=64 * MIB, running=1, budget=2048, every=1024, **more):
    return Engine(
        model,
        tokenizer,
        max_num_seqs=running,
        max_model_len=1100,
        max_num_batched_tokens=budget,
        prefix_cache_bytes=cache,
        prefix_cache_interval=every,
        **more,
    )


def ask(it, ids, params=PARAMS, **more):
    request = it.add(ids, params, **more)
    while not request.finished:
        it.step()
    return request.completion()


def same(hit, miss):
    """Whether two completions have the same tokens and log-probabilities, bit for bit."""
    return replace(hit, cached_tokens=0, cache_miss=None) == replace(miss, cached_tokens=0, cache_miss=None)


def poison(it):
    """Overwrite all slots and pages."""
    assert not it.busy
    for pool in (*it.runner.state.slot_pools, *it.runner.state.page_pools):
        pool.fill_(1e4)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 127, 128, 129, 130, 255, 256, 257, 300, 640])
@pytest.mark.parametrize("every", [128, 256])
def test_prefix_cache_hit_continues_exactly_as_a_miss(model, tokenizer, length, every):
    it = engine(model, tokenizer, every=every, budget=257)
    ids = random_ids(length)
    miss = ask(it, ids)
    poison(it)
    hit = ask(it, ids)
    assert same(hit, miss)
    assert (miss.cached_tokens, miss.cache_miss) == (0, "no checkpoint")
    assert hit.cached_tokens == (length - 1) // 128 * 128, (
        "of an exact multiple of 128 the last chunk is computed for its logits"
    )
    assert same(miss, ask(engine(model, tokenizer, every=every, budget=257), ids))


@pytest.mark.parametrize("place", [1, 2, 3, 4, 127, 128, 129, 131, 199])
def test_prefix_cache_breakpoint_at_any_position_is_exact(model, tokenizer, place):
    it = engine(model, tokenizer)
    ids = random_ids(200)
    miss = ask(it, ids, cache_breakpoints=[place, 0, 9999])
    poison(it)
    hit = ask(it, ids[:place] + random_ids(50, 7), cache_breakpoints=[place])
    assert hit.cached_tokens == place if place > 1 else hit.cached_tokens <= 1
    poison(it)
    assert same(ask(it, ids, cache_breakpoints=[place]), miss)
    alone = ask(engine(model, tokenizer), ids[:place] + random_ids(50, 7), cache_breakpoints=[place])
    assert same(hit, alone)


@pytest.mark.parametrize("system", [37, 137, 237, 337])
def test_prefix_cache_hits_do_not_depend_on_the_length_of_the_prefix(model, tokenizer, system):
    it = engine(model, tokenizer)
    head = random_ids(system, 1)
    for turn in range(4):
        out = ask(it, head + random_ids(90 + turn, 10 + turn), cache_breakpoints=[system])
        assert out.cached_tokens == (system if turn else 0)


def test_prefix_cache_next_turn_of_a_chat_hits_just_before_the_think_tag(model, tokenizer):
    it = engine(model, tokenizer)
    history, think_open = random_ids(210, 1), tokenizer.encode("<think>\n")
    ask(it, history + think_open, cache_breakpoints=[len(history)])
    out = ask(
        it,
        history + tokenizer.encode("the answer") + random_ids(30, 2) + think_open,
        cache_breakpoints=[len(history)],
    )
    assert out.cached_tokens == len(history)


def test_prefix_cache_hit_overwrites_a_used_slot(model, tokenizer):
    it = engine(model, tokenizer, running=3)
    ids = random_ids(200)
    wanted = ask(it, ids)
    for seed in range(3):
        ask(it, random_ids(300, seed + 20))
        assert same(ask(it, ids), wanted)


def test_prefix_cache_hit_is_shared_by_n_completions(model, tokenizer):
    ids, params = random_ids(300), replace(PARAMS, n=3)
    it = engine(model, tokenizer, running=3)
    first, again = it.generate([ids], params), it.generate([ids], params)
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert [c.cached_tokens for c in again] == [256] * 3 and [c.cached_tokens for c in first] == [0] * 3


def test_prefix_cache_of_another_salt_is_not_visible(model, tokenizer):
    it = engine(model, tokenizer)
    ids = random_ids(300)
    ask(it, ids, salt="a")
    other = ask(it, ids, salt="b")
    assert (other.cached_tokens, other.cache_miss) == (0, "no checkpoint") and it.prefix_cache.misses[
        "salt"
    ] == 1
    assert ask(it, ids, salt="a").cached_tokens == ask(it, ids, salt="b").cached_tokens == 256


def test_prefix_cache_miss_has_a_reason(model, tokenizer):
    it = engine(model, tokenizer)
    ids = random_ids(300)
    assert ask(it, ids).cache_miss == "no checkpoint"
    assert ask(it, ids[:200] + random_ids(100, 5)).cache_miss == "diverged at token 200"
    assert ask(it, ids).cache_miss is None
    assert ask(Engine(model, tokenizer, max_num_seqs=1, max_model_len=400), ids).cache_miss == "off"
    small = engine(model, tokenizer, cache=it.prefix_cache.bytes // 2)
    ask(small, ids)
    ask(small, random_ids(300, 9))
    assert (
        ask(small, ids).cache_miss == "evicted"
        and small.prefix_cache.bytes <= small.prefix_cache.budget_bytes
    )


def test_prefix_cache_is_looked_up_once_for_each_prompt(model, tokenizer):
    it = engine(model, tokenizer, running=2, budget=130)
    requests = [it.add(random_ids(length, length), PARAMS) for length in (700, 300, 200)]
    while it.busy:
        it.step()
    assert it.prefix_cache.misses == {"no checkpoint": 3} and all(r.finished for r in requests)


def test_prefix_cache_snapshot_larger_than_the_budget_evicts_no_other(model, tokenizer):
    it = engine(model, tokenizer)
    ask(it, random_ids(200))
    small = engine(model, tokenizer, cache=it.prefix_cache.bytes + 1000)
    ask(small, random_ids(200))
    assert ask(small, random_ids(1000, 1)).cache_miss == "no checkpoint"
    assert ask(small, random_ids(200)).cached_tokens == 128


def test_prefix_cache_snapshots_of_one_text_share_pages(model, tokenizer):
    it = engine(model, tokenizer, every=128)
    ask(it, random_ids(1030))
    state = it.runner.state
    slot, page = (sum(pool[0].nbytes for pool in pools) for pools in (state.slot_pools, state.page_pools))
    assert len(it.prefix_cache) == 8
    assert it.prefix_cache.bytes == 8 * (slot + page) + sum(4 * 128 * n for n in range(1, 9))


def test_prefix_cache_with_preemption_changes_no_text(model, tokenizer):
    texts = [random_ids(150, 1) + random_ids(length, length) for length in (1, 50, 106, 107, 200)] * 2
    params = [replace(PARAMS, seed=i, max_tokens=180) for i in range(10)]
    wanted = Engine(model, tokenizer, max_num_seqs=10, max_model_len=600).generate(texts, params)
    it = Engine(
        model,
        tokenizer,
        max_num_seqs=5,
        max_model_len=600,
        max_num_batched_tokens=140,
        num_kv_pages=9,
        overcommit=True,
        prefix_cache_bytes=8 * MIB,
    )
    got = it.generate(texts, params)
    assert [c.token_ids for c in got] == [c.token_ids for c in wanted]
    assert it.prefix_cache.hits and it.scheduler.num_preemptions and sum(c.cached_tokens for c in got)
    assert it.scheduler.slots.num_used == it.scheduler.pages.num_used == 0


class Cached(RuleBasedStateMachine):
    """Short texts of two letters and a small budget; an ordered dictionary is the reference."""

    @initialize(budget=st.integers(0, 60))
    def begin(self, budget):
        self.prefix_cache, self.stored = PrefixCache(budget * 10), OrderedDict()

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=5), salt=st.sampled_from("ab"))
    def put(self, text, salt):
        piece = object()
        self.prefix_cache.put(text, salt, piece, [(id(piece), 10 + len(text))])
        key = (salt, tuple(text))
        if 10 + 5 * len(text) > self.prefix_cache.budget_bytes:
            return
        self.stored.setdefault(key, piece)
        self.stored.move_to_end(key)
        while sum(10 + 5 * len(t) for _, t in self.stored) > self.prefix_cache.budget_bytes:
            self.stored.popitem(last=False)

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=6), salt=st.sampled_from("ab"))
    def find(self, text, salt):
        found = self.prefix_cache.find(text, salt)
        wanted = max(
            (t for s, t in self.stored if s == salt and len(t) < len(text) and t == tuple(text[: len(t)])),
            key=len,
            default=None,
        )
        if wanted is None:
            assert isinstance(found, str)
        else:
            assert (
                isinstance(found, Snapshot)
                and found.position == len(wanted)
                and found.saved is self.stored[salt, wanted]
            )
            self.stored.move_to_end((salt, wanted))

    @invariant()
    def bytes_equal_those_of_the_stored_texts_within_the_budget(self):
        if hasattr(self, "prefix_cache"):
            assert len(self.prefix_cache) == len(self.stored)
            assert (
                self.prefix_cache.bytes
                == sum(10 + 5 * len(t) for _, t in self.stored)
                <= self.prefix_cache.budget_bytes
            )


Cached.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCached = Cached.TestCase
