from dataclasses import replace

import pytest
from engine_helpers import is_idle, random_ids, record_calls, run_until_idle

from nanohybrid.engine.engine import Engine
from nanohybrid.engine.parallel_sampling import choice_seed
from nanohybrid.engine.params import SamplingParams

DRAWN = SamplingParams(
    max_tokens=14, ignore_eos=True, temperature=1.0, seed=5, logprobs=True, top_logprobs=2, n=4
)


def separate(model, tokenizer, ids, params):
    """The completions of `n` separate requests, with the seeds of the choices."""
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=400)
    each = [replace(params, n=1, seed=choice_seed(params.seed, i)) for i in range(params.n)]
    return engine.generate([ids] * params.n, each)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize(("running", "budget"), [(8, 2048), (2, 140), (1, 140)])
def test_n_completions_equal_separate_requests(model, tokenizer, length, running, budget):
    engine = Engine(model, tokenizer, max_num_seqs=running, max_model_len=400, max_num_batched_tokens=budget)
    ids, other = random_ids(length), random_ids(200, 1)
    out = engine.generate(
        [other, ids, other], [replace(DRAWN, n=1), DRAWN, replace(DRAWN, n=2, temperature=0)]
    )
    assert len(out) == 7 and is_idle(engine)
    for got, wanted in zip(out[1:5], separate(model, tokenizer, ids, DRAWN), strict=True):
        assert got.token_ids == wanted.token_ids and got.text == wanted.text
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert len({tuple(c.token_ids) for c in out[1:5]}) == 4
    assert out[5].token_ids == out[6].token_ids


def test_n_completions_compute_the_prompt_once(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer, max_num_seqs=4, max_model_len=400)
    engine.add_choices(random_ids(300), DRAWN)
    calls = record_calls(monkeypatch, engine.runner, "run")
    run_until_idle(engine)
    lengths = [length for (work,) in calls for _, _, length in work]
    assert sorted(lengths)[-2:] == [1, 300] and len(lengths) == 1 + 4 * 13


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
@pytest.mark.parametrize("gone", [(0,), (1, 3), (0, 1), (0, 1, 2, 3)])
def test_cancelling_a_completion_changes_no_other(model, tokenizer, steps, gone):
    ids = random_ids(300, 2)
    engine = Engine(model, tokenizer, max_num_seqs=2, max_model_len=400, max_num_batched_tokens=140)
    choices = engine.add_choices(ids, DRAWN)
    for _ in range(steps):
        engine.step()
    for index in gone:
        engine.cancel(choices[index])
        engine.cancel(choices[index])
    while engine.busy:
        engine.step()
    assert is_idle(engine)
    for index, wanted in enumerate(separate(model, tokenizer, ids, DRAWN)):
        if index not in gone:
            assert choices[index].completion().token_ids == wanted.token_ids


def test_preempted_and_cancelled_request_hands_its_state_to_its_group(model, tokenizer):
    ids = random_ids(300, 2)
    engine = Engine(
        model, tokenizer, max_num_seqs=2, max_model_len=400, max_num_batched_tokens=130, overcommit=True
    )
    choices = engine.add_choices(ids, DRAWN)
    engine.step()
    engine.scheduler.preempt(choices[0])  # the copy is made at the next step
    engine.cancel(choices[0])
    while engine.busy:
        engine.step()
    for got, wanted in zip(choices[1:], separate(model, tokenizer, ids, DRAWN)[1:], strict=True):
        assert got.completion().token_ids == wanted.token_ids
    assert is_idle(engine)


def test_n_completions_have_separate_thinking_budgets(model, tokenizer):
    ids = tokenizer.encode("Assistant\n<think>\n")
    for budget in (0, 3):
        params = SamplingParams(
            max_tokens=40,
            temperature=1.0,
            seed=1,
            thinking_budget=budget,
            thinking_grace=4,
            ignore_eos=True,
            n=3,
        )
        got = Engine(model, tokenizer, max_num_seqs=3, max_model_len=100).generate([ids], params)
        assert got == separate(model, tokenizer, ids, params)
        assert all(c.text.count("</think>\n\n") == 1 for c in got)


def test_add_refuses_n_above_1(model, tokenizer):
    with pytest.raises(ValueError, match="add_choices"):
        Engine(model, tokenizer, max_num_seqs=1, max_model_len=100).add([20], SamplingParams(n=2))
