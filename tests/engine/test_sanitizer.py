"""The cache sanitizer: what unowned slots and pages hold, and how misuse of the cache is detected."""

from dataclasses import replace

import pytest
import torch
from engine_helpers import random_ids, run_until_idle

from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams
from nanohybrid.engine.random_weights import random_model

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True)


def rows(allocation, pools):
    """Copies of what the pools hold at the ids of an allocation."""
    return [pool[index].float().clone() for pool in pools for index in allocation.ids]


@pytest.mark.parametrize("narrow", [{}, {"mamba_ssm_cache_dtype": "fp16", "kv_cache_dtype": "fp8"}])
def test_sanitizer_zeroes_allocated_slots_and_poisons_freed_ones(model, tokenizer, monkeypatch, narrow):
    engine = Engine(model, tokenizer, max_num_seqs=2, max_model_len=300, debug=True, **narrow)
    state = engine.runner.state
    assert all(pool.float().isnan().all() for pool in (*state.slot_pools, *state.page_pools))
    request = engine.add(random_ids(200), GREEDY)
    other = engine.add(random_ids(5, 1), replace(GREEDY, max_tokens=60))
    executor, at_start = engine.runner.executor, []
    run = executor.run

    def recording_run(*arguments):
        at_start.append(rows(request.slot, state.slot_pools))
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "run", recording_run)
        engine.step()
    assert not any(row.any() for row in at_start[0]), "the prompt began in a slot that was not zero"
    slot, pages = request.slot, request.pages
    while not request.finished:
        engine.step()
    engine.step()
    freed = rows(slot, state.slot_pools) + rows(pages, state.page_pools)
    assert all(row.isnan().all() for row in freed)
    run_until_idle(engine)
    assert torch.tensor(other.completion().logprobs).isfinite().all()


def test_slot_is_zeroed_on_allocation_without_the_sanitizer(model, tokenizer):
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=300, debug=False)
    for pool in engine.runner.state.slot_pools:
        pool.fill_(float("nan"))
    wanted = Engine(model, tokenizer, max_num_seqs=1, max_model_len=300).generate([random_ids(3)], GREEDY)[0]
    assert engine.generate([random_ids(3)], GREEDY)[0] == wanted


def test_environment_variable_turns_the_sanitizer_on(model, tokenizer, monkeypatch):
    for value, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("NANOHYBRID_DEBUG", value)
        engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=200)
        assert (engine.runner.sanitizer is not None) == on


def decoding(model, tokenizer, count=2):
    """An engine with the sanitizer, and requests that decode."""
    engine = Engine(model, tokenizer, max_num_seqs=3, max_model_len=300, debug=True)
    requests = [engine.add(random_ids(20 + i, i), replace(GREEDY, max_tokens=50)) for i in range(count)]
    for _ in range(3):
        engine.step()
    return engine, requests


def test_sanitizer_detects_a_stale_slot(model, tokenizer):
    """A request is preempted and resumed, but uses its old allocation."""
    engine, (request, _) = decoding(model, tokenizer)
    stale = request.slot
    engine.scheduler.preempt(request)
    engine.add(random_ids(30, 9), GREEDY)
    engine.step()
    assert request.slot != stale
    request.slot = stale
    with pytest.raises(
        RuntimeError, match=f"request {request.id} uses allocation {stale.generation} of slot"
    ):
        engine.step()


def test_sanitizer_detects_the_slot_of_another_request(model, tokenizer):
    engine, (first, second) = decoding(model, tokenizer)
    first.slot = first.slot._replace(ids=second.slot.ids)
    with pytest.raises(RuntimeError, match="uses allocation"):
        engine.step()


def test_sanitizer_detects_the_page_of_another_request(model, tokenizer):
    engine, (first, second) = decoding(model, tokenizer)
    first.pages = first.pages._replace(ids=second.pages.ids)
    with pytest.raises(RuntimeError, match="uses page"):
        engine.step()


def test_sanitizer_detects_a_slot_that_is_allocated_twice(model, tokenizer, monkeypatch):
    engine, (first, _) = decoding(model, tokenizer)
    allocate = engine.scheduler.slots.allocate
    monkeypatch.setattr(engine.scheduler.slots, "allocate", lambda: allocate()._replace(ids=first.slot.ids))
    engine.add(random_ids(7, 3), GREEDY)
    with pytest.raises(RuntimeError, match=r"slot \d is allocated to request 2"):
        engine.step()


@pytest.mark.parametrize("speculate", [0, 4])
def test_non_finite_logits_fail_their_own_request_and_leave_no_nan_in_its_pages(model, tokenizer, speculate):
    """The next owner of its pages reads masked rows past its end, where zero times NaN would be NaN."""
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
    fine = [[token for token in random_ids(250, seed) if token != 14] for seed in (1, 2)]
    params = replace(GREEDY, logit_bias={14: -1000.0})
    wanted = [
        Engine(broken, tokenizer, max_num_seqs=1, max_model_len=400).generate([p], params)[0]
        for p in (fine[0], fine[1][:3])
    ]
    bad = engine.add([14] * 300, params)
    neighbor = engine.add(fine[0], params)
    run_until_idle(engine)
    assert bad.finish_reason == "error"
    # Beside a longer request, a short one reads far past its end.
    follower = [engine.add(fine[0], params), engine.add(fine[1][:3], params)]
    run_until_idle(engine)
    assert [r.tokens for r in (neighbor, *follower)] == [wanted[0].token_ids, *(w.token_ids for w in wanted)]
    assert not any(pool.isnan().any() for pool in engine.runner.state.page_pools)
    assert engine.scheduler.slots.num_used == engine.scheduler.pages.num_used == 0
