"""The ways in which inference of hybrid models is known to fail in other engines, one test each.

All run with the cache sanitizer on: unowned slots and pages are NaN, and a stale allocation raises. The
    expected tokens are those of the whole text through the model for each token, without a cache.
"""

import random
from dataclasses import replace

import pytest
from engine_helpers import greedy_reference, random_ids, run_until_idle

from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams
from nanohybrid.errors import InputError
from nanohybrid.model import Layout

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True)
LONGER = replace(GREEDY, max_tokens=25)
CONV = 4  # the conv window, of which three inputs are stored


def engine_of(model, tokenizer, **options):
    return Engine(model, tokenizer, **{"max_num_seqs": 4, "max_model_len": 700, "debug": True, **options})


@pytest.fixture(scope="module")
def expected(model):
    """Greedy tokens and their log-probabilities after a prompt, by definition."""
    computed = {}

    def of(ids, count):
        if (tuple(ids), count) not in computed:
            computed[tuple(ids), count] = greedy_reference(model, ids, count)
        return computed[tuple(ids), count]

    return of


def run_and_check(engine, requests, expected):
    """Run until no request is left, and compare tokens and log-probabilities with the expected ones."""
    run_until_idle(engine)
    for request in requests:
        tokens, logprobs = expected(request.prompt, request.params.max_tokens)
        assert request.tokens == tokens
        assert request.logprobs == pytest.approx(logprobs, abs=2e-4)


@pytest.mark.parametrize("rest", range(1, CONV + 2))
def test_last_chunk_shorter_than_the_conv_window_keeps_its_own_inputs(model, tokenizer, expected, rest):
    """The conv window then holds inputs of the last chunk and of a prefix that other requests share."""
    engine = engine_of(
        model, tokenizer, max_num_batched_tokens=1, prefix_cache_bytes=2**22, prefix_cache_interval=128
    )
    ids = random_ids(128 + rest, rest)
    for ending in (ids, ids[:128] + random_ids(rest, 99), ids):
        request = engine.add(ending, GREEDY)
        run_and_check(engine, [request], expected)
    assert request.num_cached_tokens == 128


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 257, 384])
def test_prompt_of_exactly_n_chunks_recomputes_its_last_token_on_a_hit(model, tokenizer, expected, length):
    """Its snapshot is at its end, where the logits of the last token are still needed."""
    engine = engine_of(model, tokenizer, prefix_cache_bytes=2**22, prefix_cache_interval=128)
    for _ in range(2):
        request = engine.add(random_ids(length), GREEDY, cache_breakpoints=[length])
        run_and_check(engine, [request], expected)
    assert request.num_cached_tokens == (length - 1) // 128 * 128


def test_snapshot_is_not_changed_by_requests_that_continue_from_it(model, tokenizer, expected):
    """Several requests continue from one snapshot with different texts."""
    engine = engine_of(model, tokenizer, prefix_cache_bytes=2**22, prefix_cache_interval=128)
    for seed in range(4):
        request = engine.add(random_ids(256) + random_ids(7 + seed, seed + 5), GREEDY)
        run_and_check(engine, [request], expected)
    assert request.num_cached_tokens == 256 and engine.prefix_cache.hits == 3


@pytest.mark.parametrize("lengths", [(1, 130, 5, 128), (129, 2, 300, 17), (16, 17, 31, 33)])
def test_padding_of_a_ragged_batch_stays_out_of_the_states(model, tokenizer, expected, lengths):
    engine = engine_of(model, tokenizer)
    requests = [engine.add(random_ids(length, length), GREEDY) for length in lengths]
    run_and_check(engine, requests, expected)


@pytest.mark.parametrize("budget", [1, 130, 260, 300, 515])
def test_chunks_of_several_prompts_continue_from_their_own_states(model, tokenizer, expected, budget):
    """Chunks of several prompts share a step, at any position of the batch."""
    engine = engine_of(model, tokenizer, max_num_batched_tokens=budget)
    requests = [engine.add(random_ids(length, length), GREEDY) for length in (200, 129, 340, 64)]
    run_and_check(engine, requests, expected)


def test_request_preempted_in_its_prompt_continues_from_its_own_state(model, tokenizer, expected):
    """Its old slot has another owner in the meantime."""
    engine = engine_of(model, tokenizer, max_num_seqs=2, max_num_batched_tokens=1)
    first = engine.add(random_ids(400), GREEDY)
    engine.step()
    assert 0 < first.num_computed_tokens < 400
    old = first.slot.ids
    engine.scheduler.preempt(first)
    blocker = engine.scheduler.slots.allocate()
    assert blocker.ids == old
    others = [engine.add(random_ids(30, 3), GREEDY)]
    engine.step()
    engine.scheduler.slots.free(blocker)
    run_and_check(engine, (first, *others), expected)


def test_drafts_are_not_added_to_an_unfinished_prompt(model, tokenizer, expected):
    """Drafts, chunked prefill and prefix cache hits at once."""
    engine = engine_of(
        model,
        tokenizer,
        max_num_batched_tokens=1,
        num_speculative_tokens=5,
        prefix_cache_bytes=2**22,
        prefix_cache_interval=128,
    )
    engine.scheduler.propose = lambda request, limit: [
        *expected(request.prompt, 25)[0][len(request.tokens) :][:2],
        100,
    ][: min(limit, 5)]
    for _ in range(2):
        requests = [engine.add([7, 8, 9] * 60 + random_ids(length, 1), LONGER) for length in (3, 150)]
        run_and_check(engine, requests, expected)
    assert (
        engine.proposer.num_accepted_tokens > 20
        and requests[0].num_cached_tokens
        and requests[1].num_cached_tokens
    )


def test_plain_steps_continue_from_states_that_drafts_advanced(model, tokenizer, expected):
    """Some requests of a step have drafts and others have none, in changing order."""
    engine = engine_of(model, tokenizer, num_speculative_tokens=3)
    turn = []

    def propose(request, limit):
        turn.append(request.id)
        return (
            expected(request.prompt, 25)[0][len(request.tokens) :][: min(limit, 3)]
            if (len(turn) + request.id) % 3 == 0
            else []
        )

    engine.scheduler.propose = propose
    requests = [engine.add(random_ids(9 + i, i), LONGER) for i in range(4)]
    run_and_check(engine, requests, expected)


@pytest.mark.parametrize("overcommit", [False, True])
def test_request_that_needs_every_page_ends(model, tokenizer, expected, overcommit):
    """Others wait beside the request, and none is preempted forever."""
    engine = engine_of(model, tokenizer, num_kv_pages=3, max_model_len=384, overcommit=overcommit)
    largest = engine.add(random_ids(378), GREEDY)
    others = [engine.add(random_ids(20, i), GREEDY) for i in range(3)]
    run_and_check(engine, (largest, *others), expected)
    with pytest.raises(InputError, match="385"):
        engine.add(random_ids(379), GREEDY)


@pytest.mark.parametrize("budget", [1, 2, 127, 128, 129, 191])
def test_token_budget_below_a_chunk_advances_every_prompt(model, tokenizer, expected, budget):
    """Chunks end at multiples of 128: a small budget must not be rounded down to 0."""
    engine = engine_of(model, tokenizer, max_num_seqs=3, max_num_batched_tokens=budget)
    requests = [engine.add(random_ids(length, length), GREEDY) for length in (300, 128, 5)]
    run_and_check(engine, requests, expected)


def test_more_requests_than_slots_are_all_answered(model, tokenizer, expected):
    engine = engine_of(model, tokenizer, max_num_seqs=2)
    requests = [engine.add(random_ids(3 + i, i), GREEDY) for i in range(9)]
    run_and_check(engine, requests, expected)


@pytest.mark.parametrize("shift", [0, 1, 100, 127])
def test_system_prompt_hits_at_any_length(model, tokenizer, expected, shift):
    """Other engines cache at multiples of a block only, and miss when a prompt grows by a few tokens."""
    engine = engine_of(model, tokenizer, prefix_cache_bytes=2**23, prefix_cache_interval=128)
    system = random_ids(shift, 50) + random_ids(210, 51)
    for question in range(3):
        request = engine.add(system + random_ids(9, question), GREEDY, cache_breakpoints=[len(system)])
        run_and_check(engine, [request], expected)
        assert request.num_cached_tokens == (len(system) if question else 0)
    assert (engine.prefix_cache.hits, engine.prefix_cache.misses.total()) == (2, 1)


@pytest.mark.parametrize("length", [1, 2, 60])
def test_prefix_shorter_than_a_chunk_is_found(model, tokenizer, expected, length):
    engine = engine_of(model, tokenizer, prefix_cache_bytes=2**22)
    for ending in range(2):
        request = engine.add(random_ids(length) + random_ids(3, ending), GREEDY, cache_breakpoints=[length])
        run_and_check(engine, [request], expected)
    assert request.num_cached_tokens == length and request.cache_miss is None


def test_repeated_runs_over_a_warm_cache_give_the_same_answers(model, tokenizer, expected):
    """The same prompts several times, over used slots and an overcommitted cache."""
    engine = engine_of(
        model,
        tokenizer,
        max_num_seqs=3,
        prefix_cache_bytes=2**20,
        prefix_cache_interval=128,
        num_kv_pages=9,
        overcommit=True,
    )
    for turn in range(4):
        requests = [
            engine.add(random_ids(length, length), GREEDY)
            for length in random.Random(turn).sample((5, 128, 130, 260, 300), 5)
        ]
        run_and_check(engine, requests, expected)


def test_layout_refuses_two_sequences_in_one_slot(model, tokenizer):
    with pytest.raises(ValueError, match="one slot of its own"):
        Layout.with_cache([1, 1], [3, 3], [2, 2], [(0,), (1,)])
