"""What surrounds a step of the engine: the retry where memory runs out, and the watchdog."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from engine_helpers import random_ids, run_until_idle

from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
CUDA_OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU_OOM = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


def engine_of(model, tokenizer, **options):
    return Engine(
        model,
        tokenizer,
        max_num_seqs=2,
        max_model_len=400,
        max_num_batched_tokens=1000,
        debug=True,
        **options,
    )


@pytest.fixture
def expected(model, tokenizer):
    return engine_of(model, tokenizer).generate([random_ids(390)], GREEDY)[0].token_ids


def test_out_of_memory_in_the_probe_lowers_the_token_budget(model, tokenizer, monkeypatch, expected):
    engine = engine_of(model, tokenizer)
    run, probe_memory, lengths = engine.runner.run, engine.runner.probe_memory, []

    def probe(tokens):
        if tokens > 300:
            raise CPU_OOM
        probe_memory(tokens)

    def recording_run(work):
        lengths.append(sum(length for _, _, length in work))
        return run(work)

    monkeypatch.setattr(engine.runner, "probe_memory", probe)
    monkeypatch.setattr(engine.runner, "run", recording_run)
    assert engine.generate([random_ids(390)], GREEDY)[0].token_ids == expected
    assert engine.scheduler.max_num_batched_tokens < 1000 and engine.scheduler.num_budget_cuts >= 1
    assert max(lengths) <= 300


def fail_once(monkeypatch, engine, error):
    """Let the first step of more than 200 tokens raise, at the worst time: after it wrote all states."""
    run, failures = engine.runner.run, [error]

    def failing(work):
        result = run(work)
        if failures and sum(length for _, _, length in work) > 200:
            raise failures.pop()
        return result

    monkeypatch.setattr(engine.runner, "run", failing)


def test_out_of_memory_in_a_step_that_begins_prompts_is_retried(model, tokenizer, monkeypatch, expected):
    engine = engine_of(model, tokenizer)
    fail_once(monkeypatch, engine, CUDA_OOM)
    assert engine.generate([random_ids(390)], GREEDY)[0].token_ids == expected
    assert engine.scheduler.max_num_batched_tokens < 1000 and engine.scheduler.num_budget_cuts == 1


def test_out_of_memory_in_a_step_that_continues_a_prompt_raises(model, tokenizer, monkeypatch):
    """The failed step may have advanced the state of the prompt, so it cannot be computed again."""
    engine = engine_of(model, tokenizer)
    request, other = engine.add(random_ids(390), GREEDY), engine.add(random_ids(3, 5), GREEDY)
    engine.scheduler.max_num_batched_tokens = 130
    engine.step()
    engine.scheduler.max_num_batched_tokens = 1000
    assert request.num_computed_tokens == 128 and not other.num_computed_tokens
    fail_once(monkeypatch, engine, CUDA_OOM)
    with pytest.raises(torch.OutOfMemoryError):
        run_until_idle(engine)


def always_fail(monkeypatch, engine, error):
    """Let every step raise; returns the list of the works that were tried."""
    tried = []

    def failing(work):
        tried.append(work)
        raise error

    monkeypatch.setattr(engine.runner, "run", failing)
    engine.add(random_ids(300), replace(GREEDY, max_tokens=12))
    return tried


def test_out_of_memory_in_the_retry_raises(model, tokenizer, monkeypatch):
    engine = engine_of(model, tokenizer)
    tried = always_fail(monkeypatch, engine, CUDA_OOM)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    assert len(tried) == 2


def test_other_errors_do_not_lower_the_token_budget(model, tokenizer, monkeypatch):
    engine = engine_of(model, tokenizer)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    tried = always_fail(monkeypatch, engine, error)
    with pytest.raises(RuntimeError, match="illegal"):
        engine.step()
    assert len(tried) == 1 and engine.scheduler.num_budget_cuts == 0


def test_watchdog_sees_a_stalled_step_from_another_thread(model, tokenizer, monkeypatch):
    engine = engine_of(model, tokenizer, step_timeout=0.05)
    engine.add(random_ids(5), GREEDY)
    engine.step()
    assert engine.watchdog.seconds == 0 and not engine.watchdog.stalled
    engine.watchdog.slow = 0
    released, run = threading.Event(), engine.runner.run

    def stalled(work):
        released.wait(20)
        return run(work)

    monkeypatch.setattr(engine.runner, "run", stalled)
    thread = threading.Thread(target=engine.step)
    thread.start()
    deadline = time.monotonic() + 20
    while engine.watchdog.seconds < 0.15 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.watchdog.stalled
    released.set()
    thread.join()
    assert engine.watchdog.seconds == 0 and engine.watchdog.slow == 1 and engine.watchdog.slowest > 0.1
