"""The ways in which inference of hybrids is known to go wrong elsewhere, one test each. All run with the debug guard on: what
nobody holds is NaN, and a lease that is not current raises. The truth is the whole text through the model, nothing stored.
"""

import random
from dataclasses import replace

import pytest
import torch

from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams
from nanohybrid.errors import InputError
from nanohybrid.model import Layout

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True)
CONV = 4  # the window: three inputs are carried


def prompt(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(13, 269) for _ in range(length)]


def engine(model, tokenizer, running=4, **more):
    return Engine(model, tokenizer, max_num_seqs=running, **{"max_model_len": 700, "debug": True, **more})


@pytest.fixture(scope="module")
def truth(model):
    """Greedy tokens and their log-probabilities by definition."""
    known = {}

    def of(ids, count=GREEDY.max_tokens):
        key = tuple(ids), count
        if key not in known:
            text, scores = list(ids), []
            with torch.inference_mode():
                for _ in range(count):
                    row = model.head(
                        model.hidden(torch.tensor(text), Layout.packed([len(text)]))[-1]
                    ).log_softmax(-1)
                    text.append(int(row.argmax()))
                    scores.append(float(row.max()))
            known[key] = text[len(ids) :], scores
        return known[key]

    return of


def right(request, truth, count=GREEDY.max_tokens):
    tokens, scores = truth(request.prompt, count)
    assert request.tokens == tokens
    assert request.logprobs == pytest.approx(scores, abs=2e-4)


def run_out(it):
    count = 0
    while it.busy:
        it.step()
        count += 1
        assert count < 2000, "steps without end"


def all_right(it, requests, truth, count=GREEDY.max_tokens):
    run_out(it)
    for request in requests:
        right(request, truth, count)


@pytest.mark.parametrize("rest", range(1, CONV + 2))
def test_a_last_piece_shorter_than_the_window_of_the_conv(model, tokenizer, truth, rest):
    """It must shift the carried inputs, its own, and not those of a prefix that others share."""
    it = engine(
        model, tokenizer, max_num_batched_tokens=1, prefix_cache_bytes=2**22, prefix_cache_interval=128
    )
    ids = prompt(128 + rest, rest)
    for ending in (ids, ids[:128] + prompt(rest, 99), ids):
        request = it.add(ending, GREEDY)
        run_out(it)
        right(request, truth)
    assert request.num_cached_tokens == 128


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 257, 384])
def test_a_prompt_that_is_an_exact_multiple_of_the_chunk(model, tokenizer, truth, length):
    """Its checkpoint is at its end, where the logits of its last token are still wanted: a hit may not use it whole."""
    it = engine(model, tokenizer, prefix_cache_bytes=2**22, prefix_cache_interval=128)
    for _ in range(2):
        request = it.add(prompt(length), GREEDY, cache_breakpoints=[length])
        run_out(it)
        right(request, truth)
    assert request.num_cached_tokens == (length - 1) // 128 * 128


def test_a_checkpoint_is_not_what_a_later_request_made_of_it(model, tokenizer, truth):
    """Several go on from one checkpoint, differently, and it stays what it was."""
    it = engine(model, tokenizer, prefix_cache_bytes=2**22, prefix_cache_interval=128)
    for seed in range(4):
        request = it.add(prompt(256) + prompt(7 + seed, seed + 5), GREEDY)
        run_out(it)
        right(request, truth)
    assert request.num_cached_tokens == 256 and it.prefix_cache.hits == 3


@pytest.mark.parametrize("lengths", [(1, 130, 5, 128), (129, 2, 300, 17), (16, 17, 31, 33)])
def test_padded_tails_of_a_ragged_batch_stay_out_of_the_states(model, tokenizer, truth, lengths):
    it = engine(model, tokenizer)
    requests = [it.add(prompt(length, length), GREEDY) for length in lengths]
    all_right(it, requests, truth)


@pytest.mark.parametrize("budget", [1, 130, 260, 300, 515])
def test_borders_of_chunks_and_of_sequences_that_differ(model, tokenizer, truth, budget):
    """Pieces of several prompts in one step: each goes on from its own state, wherever the batch puts it."""
    it = engine(model, tokenizer, max_num_batched_tokens=budget)
    requests = [it.add(prompt(length, length), GREEDY) for length in (200, 129, 340, 64)]
    all_right(it, requests, truth)


def test_a_request_put_aside_in_mid_prompt_goes_on_from_its_own_state(model, tokenizer, truth):
    """Its old slot has another owner meanwhile."""
    it = engine(model, tokenizer, running=2, max_num_batched_tokens=1)
    first = it.add(prompt(400), GREEDY)
    it.step()
    assert 0 < first.num_computed_tokens < 400
    old = first.slot.ids
    it.scheduler.preempt(first)
    thief = it.scheduler.slots.allocate()
    assert thief.ids == old
    others = [it.add(prompt(30, 3), GREEDY)]
    it.step()
    it.scheduler.slots.free(thief)
    all_right(it, (first, *others), truth)


def test_drafts_are_no_part_of_a_prompt_that_is_still_being_read(model, tokenizer, truth):
    """Drafting, prefill in pieces, and a hit in the cache at once."""
    it = engine(
        model,
        tokenizer,
        max_num_batched_tokens=1,
        num_speculative_tokens=5,
        prefix_cache_bytes=2**22,
        prefix_cache_interval=128,
    )
    longer = replace(GREEDY, max_tokens=25)
    it.scheduler.propose = lambda request, room: [
        *truth(request.prompt, 25)[0][len(request.tokens) :][:2],
        100,
    ][: min(room, 5)]
    for _ in range(2):
        requests = [it.add([7, 8, 9] * 60 + prompt(length, 1), longer) for length in (3, 150)]
        all_right(it, requests, truth, 25)
    assert (
        it.proposer.num_accepted_tokens > 20
        and requests[0].num_cached_tokens
        and requests[1].num_cached_tokens
    )


def test_steps_without_drafts_beside_and_after_steps_with_them(model, tokenizer, truth):
    """A state that drafts moved on is the one that the next plain step reads."""
    it = engine(model, tokenizer, num_speculative_tokens=3)
    longer, turn = replace(GREEDY, max_tokens=25), []

    def propose(request, room):
        turn.append(request.id)
        return (
            truth(request.prompt, 25)[0][len(request.tokens) :][: min(room, 3)]
            if (len(turn) + request.id) % 3 == 0
            else []
        )

    it.scheduler.propose = propose
    requests = [it.add(prompt(9 + i, i), longer) for i in range(4)]
    all_right(it, requests, truth, 25)


@pytest.mark.parametrize("overcommit", [False, True])
def test_a_request_near_the_ceiling_of_the_pool_ends(model, tokenizer, truth, overcommit):
    """It needs every page that there is; beside it others wait, and nobody is requeued for ever."""
    it = engine(model, tokenizer, num_kv_pages=3, max_model_len=384, overcommit=overcommit)
    giant = it.add(prompt(378), GREEDY)
    others = [it.add(prompt(20, i), GREEDY) for i in range(3)]
    all_right(it, (giant, *others), truth)
    with pytest.raises(InputError, match="385"):
        it.add(prompt(379), GREEDY)


@pytest.mark.parametrize("budget", [1, 2, 127, 128, 129, 191])
def test_a_budget_below_a_chunk_still_advances_every_prompt(model, tokenizer, truth, budget):
    """Cut at multiples of 128, a small budget must not round down to nothing."""
    it = engine(model, tokenizer, running=3, max_num_batched_tokens=budget)
    requests = [it.add(prompt(length, length), GREEDY) for length in (300, 128, 5)]
    all_right(it, requests, truth)


def test_more_requests_than_slots_wait_and_are_all_answered(model, tokenizer, truth):
    it = engine(model, tokenizer, running=2)
    requests = [it.add(prompt(3 + i, i), GREEDY) for i in range(9)]
    all_right(it, requests, truth)


@pytest.mark.parametrize("shift", [0, 1, 100, 127])
def test_a_system_prompt_hits_wherever_it_begins_and_ends(model, tokenizer, truth, shift):
    """A hit rate that falls to nothing when a prompt grows by some tokens is a grid that nobody asked for."""
    it = engine(model, tokenizer, prefix_cache_bytes=2**23, prefix_cache_interval=128)
    system = prompt(shift, 50) + prompt(210, 51)
    for question in range(3):
        request = it.add(system + prompt(9, question), GREEDY, cache_breakpoints=[len(system)])
        run_out(it)
        right(request, truth)
        assert request.num_cached_tokens == (len(system) if question else 0)
    assert (it.prefix_cache.hits, it.prefix_cache.misses.total()) == (2, 1)


@pytest.mark.parametrize("length", [1, 2, 60])
def test_a_prompt_shorter_than_a_chunk_is_found_too(model, tokenizer, truth, length):
    it = engine(model, tokenizer, prefix_cache_bytes=2**22)
    for ending in range(2):
        request = it.add(prompt(length) + prompt(3, ending), GREEDY, cache_breakpoints=[length])
        run_out(it)
        right(request, truth)
    assert request.num_cached_tokens == length and request.cache_miss is None


def test_answers_do_not_get_worse_run_by_run(model, tokenizer, truth):
    """The same questions again and again over a warm cache and used slots."""
    it = engine(
        model,
        tokenizer,
        running=3,
        prefix_cache_bytes=2**20,
        prefix_cache_interval=128,
        num_kv_pages=9,
        overcommit=True,
    )
    for turn in range(4):
        requests = [
            it.add(prompt(length, length), GREEDY)
            for length in random.Random(turn).sample((5, 128, 130, 260, 300), 5)
        ]
        all_right(it, requests, truth)


def test_no_layout_has_two_sequences_of_one_slot(model, tokenizer):
    with pytest.raises(ValueError, match="one slot of its own"):
        Layout.with_cache([1, 1], [3, 3], [2, 2], [(0,), (1,)])
