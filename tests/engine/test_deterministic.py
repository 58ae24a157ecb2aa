import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanohybrid.engine.engine import Engine
from nanohybrid.engine.parallel_sampling import choice_seed
from nanohybrid.engine.params import SamplingParams
from nanohybrid.engine.runner import chunks

KINDS = [
    SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True, top_logprobs=2),
    SamplingParams(
        max_tokens=9, ignore_eos=True, temperature=1.0, logprobs=True, top_p=0.95, presence_penalty=0.5
    ),
    SamplingParams(max_tokens=140, ignore_eos=True, temperature=0.8, logprobs=True, repetition_penalty=1.1),
    SamplingParams(
        max_tokens=5, ignore_eos=True, temperature=1.5, logprobs=True, min_p=0.02, logit_bias={40: 2.0}
    ),
]
HEADS = (0, 100, 128, 200, 256, 300)
ALONE = {}


def text(head, tail):
    rng = random.Random(1)
    common = [rng.randrange(13, 269) for _ in range(300)]
    rng = random.Random(tail)
    return common[:head] + [rng.randrange(13, 269) for _ in range(tail)]


def alone(model, tokenizer, head, tail, kind, seed):
    """The completion of a request that runs by itself, without a prefix cache."""
    key = model.dtype, head, tail, kind, seed
    if key not in ALONE:
        engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=600, deterministic=True)
        ALONE[key] = engine.generate([text(head, tail)], replace(KINDS[kind], seed=seed))[0]
    return ALONE[key]


asked = st.tuples(
    st.sampled_from(HEADS),
    st.sampled_from([1, 2, 28, 56, 129]),
    st.integers(0, 3),
    st.integers(0, 1),
    st.integers(0, 5),
    st.integers(1, 3),
)


@pytest.mark.parametrize("kernels", ["torch", "compiled"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    wanted=st.lists(asked, min_size=1, max_size=8),
    running=st.integers(1, 5),
    budget=st.integers(1, 500),
    pages=st.integers(5, 14),
    cached=st.booleans(),
    places=st.lists(st.integers(1, 300), max_size=2),
    asides=st.randoms(use_true_random=False),
)
def test_deterministic_request_equals_itself_alone_bit_for_bit(
    kernels, request, tokenizer, wanted, running, budget, pages, cached, places, asides
):
    model = request.getfixturevalue("model" if kernels == "torch" else "packed")
    engine = Engine(
        model,
        tokenizer,
        max_num_seqs=running,
        max_model_len=600,
        max_num_batched_tokens=budget,
        num_kv_pages=pages,
        overcommit=True,
        prefix_cache_bytes=2**22 * cached,
        prefix_cache_interval=128,
        deterministic=True,
    )
    waiting = [
        (step, replace(KINDS[kind], seed=seed, n=n), (head, tail, kind, seed))
        for head, tail, kind, seed, step, n in wanted
    ]
    requests, step = [], 0
    while waiting or engine.busy:
        for one in [one for one in waiting if one[0] <= step]:
            choices = engine.add_choices(text(*one[2][:2]), one[1], cache_breakpoints=places)
            requests += [
                (choice, (*one[2][:3], choice_seed(one[2][3], i))) for i, choice in enumerate(choices)
            ]
            waiting.remove(one)
        if engine.scheduler.running and asides.random() < 0.1:
            engine.scheduler.preempt(asides.choice(list(engine.scheduler.running.values())))
        if requests and asides.random() < 0.03:
            engine.cancel(asides.choice(requests)[0])
        engine.step()
        step += 1
    for one, key in [(one, key) for one, key in requests if not one.cancelled]:
        got = replace(one.completion(), cached_tokens=0, cache_miss=None)
        assert got == replace(alone(model, tokenizer, *key), cache_miss=None)
    assert engine.scheduler.slots.num_used == engine.scheduler.pages.num_used == 0


def test_deterministic_n_completions_equal_separate_requests(model, tokenizer):
    params = replace(KINDS[1], n=3, seed=4)
    engine = Engine(model, tokenizer, max_num_seqs=2, max_model_len=600, deterministic=True)
    separate = [replace(params, n=1, seed=choice_seed(4, i)) for i in range(3)]
    assert engine.generate([text(300, 7)], params) == engine.generate([text(300, 7)] * 3, separate)


@pytest.mark.parametrize(
    ("start", "end", "wanted"),
    [
        (0, 5, [(0, 5)]),
        (0, 128, [(0, 128)]),
        (0, 129, [(0, 128), (128, 129)]),
        (130, 131, [(130, 131)]),
        (128, 300, [(128, 256), (256, 300)]),
    ],
)
def test_chunks_end_at_multiples_of_128(start, end, wanted):
    assert chunks(start, end) == wanted


def test_deterministic_batch_invariant_executor_runs_once_a_step(packed, tokenizer, monkeypatch):
    engine = Engine(packed, tokenizer, max_num_seqs=4, max_model_len=600, deterministic=True)
    for tail in range(3, 7):
        engine.add(text(0, tail), KINDS[0])
    calls = []
    executor = engine.runner.executor
    run = executor.run
    monkeypatch.setattr(executor, "run", lambda *given: calls.append(given) or run(*given))
    engine.step()
    engine.step()
    assert len(calls) == 2
