"""Who holds which slot and page, what is in those that nobody holds, and what happens when numbers or memory give out."""

import random
import threading
import time
from dataclasses import replace

import pytest
import torch

from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams
from nanohybrid.engine.random_weights import random_model

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True)


def prompt(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(13, 269) for _ in range(length)]


def run_out(engine):
    while engine.busy:
        engine.step()


def rows(engine, allocation, pools):
    return [pool[place].float().clone() for pool in pools for place in allocation.ids]


@pytest.mark.parametrize("narrow", [{}, {"mamba_ssm_cache_dtype": "fp16", "kv_cache_dtype": "fp8"}])
def test_a_slot_is_zeroed_when_given_and_poisoned_when_freed(model, tokenizer, narrow):
    engine = Engine(model, tokenizer, max_num_seqs=2, max_model_len=300, debug=True, **narrow)
    state = engine.runner.state
    assert all(pool.float().isnan().all() for pool in (*state.slot_pools, *state.page_pools)), (
        "what nobody was given is not poisoned"
    )
    request, other = engine.add(prompt(200), GREEDY), engine.add(prompt(5, 1), replace(GREEDY, max_tokens=60))
    seen = []
    run = engine.runner.executor.run
    engine.runner.executor.run = lambda *a: (
        seen.append(rows(engine, request.slot, state.slot_pools)),
        run(*a),
    )[1]
    engine.step()
    engine.runner.executor.run = run
    assert not any(row.any() for row in seen[0]), "the prompt began in a slot that was not zero"
    slot, pages = request.slot, request.pages
    while not request.finished:
        engine.step()
    engine.step()
    assert all(
        row.isnan().all()
        for row in rows(engine, slot, state.slot_pools) + rows(engine, pages, state.page_pools)
    )
    run_out(engine)
    assert torch.tensor(other.completion().logprobs).isfinite().all()


def test_without_debug_a_slot_is_zeroed_when_given(model, tokenizer):
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=300, debug=False)
    for pool in engine.runner.state.slot_pools:
        pool.fill_(float("nan"))
    wanted = Engine(model, tokenizer, max_num_seqs=1, max_model_len=300).generate([prompt(3)], GREEDY)[0]
    assert engine.generate([prompt(3)], GREEDY)[0] == wanted


def test_the_environment_switches_it_on(model, tokenizer, monkeypatch):
    for value, wanted in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("NANOHYBRID_DEBUG", value)
        assert (
            Engine(model, tokenizer, max_num_seqs=1, max_model_len=200).runner.sanitizer is not None
        ) is wanted


def begun(model, tokenizer, count=2):
    engine = Engine(model, tokenizer, max_num_seqs=3, max_model_len=300, debug=True)
    requests = [engine.add(prompt(20 + i, i), replace(GREEDY, max_tokens=50)) for i in range(count)]
    for _ in range(3):
        engine.step()
    return engine, requests


def test_a_request_with_a_stale_slot_is_stopped(model, tokenizer):
    """Put aside and resumed, it comes back with the lease that it had before."""
    engine, (request, _) = begun(model, tokenizer)
    stale = request.slot
    engine.scheduler.preempt(request)
    engine.add(prompt(30, 9), GREEDY)  # takes the slot, or another does
    engine.step()
    assert request.slot != stale
    request.slot = stale
    with pytest.raises(
        RuntimeError, match=f"request {request.id} uses allocation {stale.generation} of slot"
    ):
        engine.step()


def test_a_request_in_anothers_slot_is_stopped(model, tokenizer):
    engine, (first, second) = begun(model, tokenizer)
    first.slot = first.slot._replace(ids=second.slot.ids)
    with pytest.raises(RuntimeError, match="uses allocation"):
        engine.step()


def test_a_request_with_anothers_page_is_stopped(model, tokenizer):
    engine, (first, second) = begun(model, tokenizer)
    first.pages = first.pages._replace(ids=second.pages.ids)
    with pytest.raises(RuntimeError, match="uses page"):
        engine.step()


def test_a_slot_is_not_given_twice(model, tokenizer):
    engine, (first, _) = begun(model, tokenizer)
    allocate = engine.scheduler.slots.allocate
    engine.scheduler.slots.allocate = lambda: allocate()._replace(ids=first.slot.ids)
    engine.add(prompt(7, 3), GREEDY)
    with pytest.raises(RuntimeError, match=r"slot \d is allocated to request 2"):
        engine.step()


@pytest.mark.parametrize("speculate", [0, 4])
def test_numbers_that_broke_fail_their_own_request_and_leave_nothing_behind(model, tokenizer, speculate):
    """The next owner of its pages reads rows past its end, masked: zero times NaN would be NaN."""
    broken = random_model(model.config, torch.float32, seed=5)
    with torch.no_grad():
        broken.backbone.embeddings.weight[14] = float("nan")
    engine = Engine(
        broken,
        tokenizer,
        max_num_seqs=2,
        max_model_len=400,
        num_kv_pages=6,
        num_speculative_tokens=speculate,
        debug=False,
    )
    fine = [[token for token in prompt(250, seed) if token != 14] for seed in (1, 2)]
    params = replace(GREEDY, logit_bias={14: -1000.0})
    wanted = [
        Engine(broken, tokenizer, max_num_seqs=1, max_model_len=400).generate([p], params)[0]
        for p in (fine[0], fine[1][:3])
    ]
    bad = engine.add([14] * 300, params)
    neighbor = engine.add(fine[0], params)
    run_out(engine)
    assert bad.finish_reason == "error"
    follower = [
        engine.add(fine[0], params),
        engine.add(fine[1][:3], params),
    ]  # beside a longer one, a short one reads far past its end
    run_out(engine)
    assert [r.tokens for r in (neighbor, *follower)] == [wanted[0].token_ids, *(w.token_ids for w in wanted)]
    assert not any(pool.isnan().any() for pool in engine.runner.state.page_pools)
    assert engine.scheduler.slots.num_used == engine.scheduler.pages.num_used == 0


@pytest.mark.parametrize("place", ["before", "first", "later"])
def test_where_memory_gives_out_prompts_get_a_smaller_budget_and_go_on(model, tokenizer, place):
    ids, params = prompt(390), replace(GREEDY, max_tokens=4)
    wanted = Engine(model, tokenizer, max_num_seqs=2, max_model_len=400).generate([ids], params)[0]
    engine = Engine(
        model, tokenizer, max_num_seqs=2, max_model_len=400, max_num_batched_tokens=1000, debug=True
    )
    request = engine.add(ids, params)
    lengths, failures, run, probe_memory = [], [True], engine.runner.run, engine.runner.probe_memory

    def failing(work):
        if place != "before" and failures and sum(length for _, _, length in work) > 200:
            failures.pop()
            run(work)  # as far as the states of the last layer, at the worst
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        lengths.append([length for _, _, length in work])
        return run(work)

    def refusing(tokens):
        if place == "before" and tokens > 300:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
            )
        probe_memory(tokens)

    engine.runner.run, engine.runner.probe_memory = failing, refusing
    if (
        place == "later"
    ):  # a state was written that the failed step may have moved on: nobody may go on from it
        other = engine.add(prompt(3, 5), params)
        engine.scheduler.max_num_batched_tokens = 130
        engine.step()
        engine.scheduler.max_num_batched_tokens = 1000
        assert request.num_computed_tokens == 128 and not other.num_computed_tokens
        with pytest.raises(torch.OutOfMemoryError):
            run_out(engine)
        return
    run_out(engine)
    assert request.completion().token_ids == wanted.token_ids
    assert engine.scheduler.max_num_batched_tokens < 1000 and engine.scheduler.num_budget_cuts >= 1
    assert place == "first" or max(map(sum, lengths)) <= 300


def test_memory_that_is_never_to_be_had_is_not_tried_for_ever(model, tokenizer):
    engine = Engine(model, tokenizer, max_num_seqs=2, max_model_len=400, max_num_batched_tokens=1000)
    engine.add(prompt(300), GREEDY)
    tried = []

    def failing(work):
        tried.append(work)
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.runner.run = failing
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    assert len(tried) == 2


def test_another_failure_is_not_taken_for_missing_memory(model, tokenizer):
    engine = Engine(model, tokenizer, max_num_seqs=2, max_model_len=400, max_num_batched_tokens=1000)
    engine.add(prompt(300), GREEDY)
    engine.runner.run = lambda work: (_ for _ in ()).throw(
        RuntimeError("CUDA error: an illegal memory access was encountered")
    )
    with pytest.raises(RuntimeError, match="illegal"):
        engine.step()
    assert engine.scheduler.num_budget_cuts == 0


def test_a_step_that_hangs_is_seen_from_another_thread(model, tokenizer):
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=200, step_timeout=0.05)
    engine.add(prompt(5), GREEDY)
    engine.step()
    assert engine.watchdog.seconds == 0 and not engine.watchdog.stalled
    engine.watchdog.slow = 0
    go, run = threading.Event(), engine.runner.run
    engine.runner.run = lambda work: (go.wait(20), run(work))[1]
    thread = threading.Thread(target=engine.step)
    thread.start()
    deadline = time.monotonic() + 20
    while engine.watchdog.seconds < 0.15 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.watchdog.stalled
    go.set()
    thread.join()
    assert engine.watchdog.seconds == 0 and engine.watchdog.slow == 1 and engine.watchdog.slowest > 0.1
