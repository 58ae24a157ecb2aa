"""Speculative decoding by prompt lookup. Drafts may change when a token is found, never which."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanohybrid.config import HybridConfig
from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams
from nanohybrid.engine.prompt_lookup import MAX_PAUSE, History, PromptLookupProposer
from nanohybrid.engine.random_weights import random_model
from nanohybrid.errors import InputError
from nanohybrid.model import HybridCache, Layout

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=True)
KINDS = [
    GREEDY,
    SamplingParams(
        max_tokens=60, ignore_eos=True, temperature=0.3, top_p=0.9, seed=7, logprobs=True, top_logprobs=3
    ),
    SamplingParams(
        max_tokens=50, ignore_eos=True, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1
    ),
    SamplingParams(max_tokens=30, stop=("a", "<")),
    SamplingParams(
        max_tokens=70, ignore_eos=True, temperature=0.5, seed=3, thinking_budget=12, thinking_grace=5
    ),
    SamplingParams(max_tokens=25, temperature=0.2, seed=1, logit_bias={40: 5.0, 41: 4.0}, stop_ids=(41,)),
    SamplingParams(max_tokens=33, ignore_eos=True, temperature=0.4, seed=9, n=3),
]


def repetitive(length, seed=0, tail=()):
    rng = random.Random(seed)
    phrase = [rng.randrange(13, 269) for _ in range(rng.randrange(2, 9))]
    return ([rng.randrange(13, 269) for _ in range(length % 5)] + phrase * length)[
        : length - len(tail)
    ] + list(tail)


def thinks(tokenizer, length, seed):
    return repetitive(length, seed, tokenizer.encode("<think>\n"))


def half_right(engine, wanted, most=15, seed=0):
    """Let drafts be right for a few tokens and then wrong. wanted: the right tokens, by request id."""
    chance, junk = random.Random(seed), random.Random(seed + 1)

    def propose(request, limit):
        written = len(request.tokens)
        right = wanted[request.id][written : written + chance.choice([0, 1, 2, 5, most])]
        return [*right, *(junk.randrange(13, 269) for _ in range(chance.randrange(3)))][: min(limit, most)]

    engine.scheduler.propose = propose


def same(got, wanted):
    assert replace(got, logprobs=None, top_logprobs=None) == replace(wanted, logprobs=None, top_logprobs=None)
    if wanted.logprobs:
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=2e-4)
    for mine, theirs in zip(got.top_logprobs or [], wanted.top_logprobs or [], strict=True):
        assert [token for token, _ in mine] == [token for token, _ in theirs]


@pytest.mark.parametrize("pattern", ["M", "*", "M-*M-", "MM*"])
@pytest.mark.parametrize("seed", [1, 2])
def test_drafts_change_no_text_of_any_pattern(tokenizer, pattern, seed):
    config = HybridConfig(
        pattern=pattern,
        vocab_size=269,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=12,
        n_groups=2,
        ssm_state_size=8,
        initializer_range=0.3,
    )
    model = random_model(config, torch.float32, seed)
    prompts = [repetitive(length, seed + length) for length in (3, 20, 127, 128, 129, 200)]
    wanted = Engine(model, tokenizer, max_num_seqs=2, max_model_len=400).generate(prompts, GREEDY)
    engine = Engine(
        model,
        tokenizer,
        max_num_seqs=4,
        max_model_len=400,
        max_num_batched_tokens=140,
        num_speculative_tokens=5,
    )
    half_right(engine, [one.token_ids for one in wanted], 5, seed)
    for got, expected in zip(engine.generate(prompts, GREEDY), wanted, strict=True):
        same(got, expected)
    assert 100 < engine.proposer.num_accepted_tokens < engine.proposer.num_draft_tokens - 20


def test_prompt_lookup_accepts_drafts_of_a_repetitive_text(model, tokenizer):
    narrow = replace(GREEDY, logit_bias={40: 100.0, 41: 100.0, 42: 100.0}, max_tokens=150)
    wanted = Engine(model, tokenizer, max_num_seqs=1, max_model_len=400).generate([repetitive(50)], narrow)[0]
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=400, num_speculative_tokens=8)
    request, steps = engine.add(repetitive(50), narrow), 0
    while not request.finished:
        engine.step()
        steps += 1
    same(request.completion(), wanted)
    assert set(wanted.token_ids) == {40, 41, 42} and steps < 100
    assert engine.proposer.num_accepted_tokens == 150 - steps <= engine.proposer.num_draft_tokens


ALONE = {}
asked = st.tuples(st.integers(0, len(KINDS) - 1), st.integers(12, 200), st.integers(0, 3), st.integers(0, 6))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    wanted=st.lists(asked, min_size=2, max_size=6),
    running=st.integers(1, 5),
    budget=st.integers(1, 400),
    pages=st.integers(6, 12),
    speculate=st.integers(1, 15),
    cached=st.booleans(),
    chance=st.randoms(use_true_random=False),
)
def test_drafts_change_no_text_with_preemption_cache_and_cancellation(
    model, tokenizer, wanted, running, budget, pages, speculate, cached, chance
):
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
        num_speculative_tokens=speculate,
    )
    plain = Engine(model, tokenizer, max_num_seqs=1, max_model_len=600)
    waiting, asked_for, gone, step, written = list(wanted), [], set(), 0, {}
    half_right(engine, written, speculate)
    while waiting or engine.busy:
        for kind, length, seed, arrives in [one for one in waiting if one[3] <= step]:
            prompt = (
                thinks(tokenizer, length, seed) if KINDS[kind].thinking_budget else repetitive(length, seed)
            )
            key = kind, length, seed
            if key not in ALONE:
                ALONE[key] = plain.generate([prompt], KINDS[kind])
            asked_for.append((engine.add_choices(prompt, KINDS[kind]), ALONE[key]))
            written.update(
                (request.id, alone.token_ids) for request, alone in zip(*asked_for[-1], strict=True)
            )
            waiting.remove((kind, length, seed, arrives))
        running_now = list(engine.scheduler.running.values())
        if running_now and chance.random() < 0.1:
            engine.scheduler.preempt(chance.choice(running_now))
        if running_now and chance.random() < 0.02:
            gone.add(chance.choice(running_now).id)
            engine.cancel(next(r for r in running_now if r.id in gone))
        engine.step()
        step += 1
    for requests, expected in asked_for:
        for request, alone in zip(requests, expected, strict=True):
            if not request.cancelled:
                same(replace(request.completion(), cached_tokens=0, cache_miss="off"), alone)
    assert engine.scheduler.slots.num_used == engine.scheduler.pages.num_used == 0


@pytest.mark.parametrize("stay", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rolled_back_draft_leaves_the_state_of_the_accepted_tokens(model, stay, dtype):
    """The draft shares a call with a prompt and a single token; the reference is one step for each token."""
    config = model.config
    copy = random_model(config, torch.float32, seed=5).to(dtype)
    text = torch.randint(13, 269, (60,), generator=torch.Generator().manual_seed(0))
    states = [HybridCache.for_context(config, 4, 128, dtype) for _ in range(2)]
    with torch.inference_mode():
        for state in states:
            copy.hidden(text[:40], Layout.contiguous([20, 20], [0, 0], [2, 0], 128), state)
        ragged = Layout.with_cache([1, 5, 7], [20, 20, 0], [0, 2, 3], [(0,), (2,), (3,)], speculative=[1])
        copy.hidden(text[:13], ragged, states[0])
        states[0].commit([0] if stay else [], [stay] if stay else [])
        for token in range(stay):
            copy.hidden(
                text[1 + token : 2 + token], Layout.with_cache([1], [20 + token], [2], [(2,)]), states[1]
            )
    for mine, theirs in zip(states[0].slot_pools, states[1].slot_pools, strict=True):
        if dtype == torch.bfloat16 or stay == 0:
            assert torch.equal(mine[2], theirs[2])
        else:
            assert (mine[2] - theirs[2]).abs().max() <= 1e-5 * theirs[
                2
            ].abs().max()  # products of one row sum in another order
        assert not mine[1].any(), "an unowned slot was written"


def test_rejected_draft_with_nan_leaves_no_nan_in_the_state(model, tokenizer):
    broken = random_model(model.config.replace(pattern="M-M-"), torch.float32, seed=5)
    with torch.no_grad():
        broken.backbone.embeddings.weight[50] = float("nan")
    prompt = repetitive(30)
    wanted = Engine(broken, tokenizer, max_num_seqs=1, max_model_len=200).generate([prompt], GREEDY)[0]
    engine = Engine(broken, tokenizer, max_num_seqs=1, max_model_len=200, num_speculative_tokens=4)
    engine.scheduler.propose = lambda request, limit: [*wanted.token_ids[len(request.tokens) :][:1], 50, 50][
        :limit
    ]
    assert 50 not in wanted.token_ids
    same(engine.generate([prompt], GREEDY)[0], wanted)


def test_forced_tokens_of_the_thinking_budget_are_drafted(model, tokenizer):
    params = SamplingParams(max_tokens=30, ignore_eos=True, thinking_budget=3, thinking_grace=0)
    prompt = thinks(tokenizer, 20, 1)
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=200, num_speculative_tokens=12)
    request = engine.add(prompt, params)
    taken = []
    while not request.finished:
        before = len(request.tokens)
        engine.step()
        taken.append(len(request.tokens) - before)
    assert len(request.completion().forced) > 8 and max(taken) > 8
    same(
        request.completion(),
        Engine(model, tokenizer, max_num_seqs=1, max_model_len=200).generate([prompt], params)[0],
    )


def test_stream_with_drafts_has_the_same_text_in_fewer_pieces(model, tokenizer):
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=200, num_speculative_tokens=8)
    wanted = Engine(model, tokenizer, max_num_seqs=1, max_model_len=200).generate([repetitive(60)], GREEDY)[0]
    half_right(engine, [wanted.token_ids])
    pieces = list(engine.stream(repetitive(60), GREEDY))
    assert "".join(pieces) == wanted.text and len(pieces) < 30


@pytest.mark.parametrize(
    ("text", "count", "wanted"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 6, [3, 4, 1, 2, 3, 4]),
        ([5, 5, 5], 3, [5, 5, 5]),
        ([1, 2, 3, 4], 3, []),
        ([7], 3, []),
        ([9, 1, 2, 3, 8, 7, 2, 3, 6, 9, 1, 2, 3], 1, [8]),  # the longer match, though another is nearer
        ([1, 2, 5, 1, 2, 6, 1, 2], 1, [6]),  # of equally long ones the latest
        ([256, 1, 0, 65536, 9, 256], 2, []),  # bytes of two ids that look like one
    ],
)
def test_prompt_lookup_proposes_what_followed_the_longest_match(text, count, wanted):
    from array import array

    lookup = History(8)
    lookup.text += array("i", text).tobytes()
    assert lookup.propose(count) == wanted


@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=40), count=st.integers(1, 15))
def test_prompt_lookup_finds_what_a_plain_search_finds(text, count):
    from array import array

    lookup = History(15)
    lookup.text += array("i", text).tobytes()
    places = [p for p in range(2, len(text)) if text[p - 2 : p] == text[-2:]]
    got = lookup.propose(count)
    assert bool(got) == bool(places) and len(got) == (count if places else 0)
    assert not places or any(got[0] == text[p] for p in places)


def test_prompt_lookup_pauses_after_rejected_drafts():
    class RepetitiveRequest:
        forced, draft, num_tokens = (), [], 0

        def slice(self, start, length):
            return [1, 2] * length

    proposer, request, steps = PromptLookupProposer(8), RepetitiveRequest(), []
    for step in range(400):
        request.num_tokens += 2
        request.draft = proposer.propose(request, 100)
        if request.draft:
            steps.append((step, len(request.draft)))
            proposer.update(request, 0)
    assert [length for _, length in steps[:3]] == [8, 1, 1] and len(steps) < 12
    assert steps[-1][0] - steps[-2][0] == MAX_PAUSE + 1
    proposer.update(request, len(request.draft))
    assert proposer.num_accepted_tokens == 0 and proposer.num_draft_tokens == sum(
        length for _, length in steps
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"num_speculative_tokens": 16},
        {"num_speculative_tokens": -1},
        {"num_speculative_tokens": 2, "deterministic": True},
    ],
)
def test_speculation_options_out_of_range_are_refused(model, tokenizer, bad):
    with pytest.raises(InputError, match="num_speculative_tokens"):
        Engine(model, tokenizer, max_num_seqs=1, **bad)
