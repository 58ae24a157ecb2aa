import math
import random

import pytest
import torch

from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams
from nanohybrid.engine.penalties import LogitsProcessors, TokenHistory
from nanohybrid.engine.sampler import SamplingMetadata, sample
from nanohybrid.errors import InputError

WIDTH = 40


def logits(rows, seed=0):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) * 3


def by_definition(row, p, prompt, tokens):
    """The formula of penalties.py, for one token of the vocabulary at a time."""
    out = row.tolist()
    for token in range(WIDTH):
        count, seen = tokens.count(token), token in tokens or token in prompt
        if seen:
            out[token] = (
                out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
            )
        out[token] -= count * p.frequency_penalty + (count > 0) * p.presence_penalty
        out[token] += dict(p.logit_bias).get(token, 0)
    return torch.tensor(out)


def random_params(rng):
    return SamplingParams(
        presence_penalty=rng.choice([0, 0.7, -1]),
        frequency_penalty=rng.choice([0, 0.3]),
        repetition_penalty=rng.choice([1, 1.3, 0.8]),
        logit_bias={rng.randrange(WIDTH): rng.uniform(-5, 5) for _ in range(rng.choice([0, 0, 3]))},
    )


def test_logits_processors_follow_the_formula_while_tokens_are_written():
    rng = random.Random(0)
    params = [random_params(rng) for _ in range(12)]
    written = [TokenHistory([rng.randrange(WIDTH) for _ in range(rng.randrange(9))], []) for _ in params]
    processors = LogitsProcessors(params, written, "cpu")
    for step in range(30):
        scores = logits(12, step)
        before = scores.clone()
        edited = processors.apply(scores)
        assert torch.equal(scores, before), "the caller's logits were changed"
        for row, (p, (prompt, tokens)) in enumerate(zip(params, written, strict=True)):
            torch.testing.assert_close(edited[row], by_definition(scores[row], p, prompt, tokens))
            tokens += [rng.randrange(WIDTH) for _ in range(rng.choice([0, 1, 1, 2]))]


def test_logits_processors_leave_rows_without_penalties_unchanged():
    params = [SamplingParams(), SamplingParams(presence_penalty=1.0)]
    scores = logits(2)
    edited = LogitsProcessors(params, [TokenHistory([1, 2], [3, 3])] * 2, "cpu").apply(scores)
    assert torch.equal(edited[0], scores[0]) and edited[1, 3] == scores[1, 3] - 1
    assert SamplingMetadata([SamplingParams()], [0]).processors is None


def test_logit_bias_beyond_the_vocabulary_has_no_effect():
    edited = LogitsProcessors(
        [SamplingParams(logit_bias={WIDTH + 3: 5.0, 2: -100.0})], [TokenHistory([], [])], "cpu"
    ).apply(logits(1))
    assert edited.shape == (1, WIDTH) and edited.argmin() == 2


def test_top_logprobs_are_the_largest_of_the_distribution():
    scores = logits(3)
    params = [
        SamplingParams(logprobs=True, top_logprobs=4),
        SamplingParams(),
        SamplingParams(temperature=0.5, logprobs=True, seed=1),
    ]
    out = sample(scores, SamplingMetadata(params, [0, 0, 1]), [5, 5, 5])
    values, ids = scores[0].log_softmax(-1).topk(4)
    assert [token for token, _ in out.top[0]] == ids.tolist()
    assert [value for _, value in out.top[0]] == pytest.approx(values.tolist(), abs=1e-5)
    assert out.top[0][0] == (out.tokens[0], pytest.approx(out.logprobs[0]))


@pytest.mark.parametrize(
    "bad",
    [
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"repetition_penalty": 0},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.inf}},
        {"top_logprobs": 2},
        {"n": 0},
    ],
)
def test_sampling_params_out_of_range_are_refused_by_name(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_engine_penalties_count_prompt_and_answer_alone_and_in_a_batch(model, tokenizer):
    rng = random.Random(1)
    texts = [[rng.randrange(13, 269) for _ in range(length)] for length in (3, 140, 20)]
    params = [
        SamplingParams(max_tokens=30, ignore_eos=True, presence_penalty=50, logprobs=True, top_logprobs=3),
        SamplingParams(
            max_tokens=20, ignore_eos=True, temperature=1.0, seed=3, repetition_penalty=1e9, logprobs=True
        ),
        SamplingParams(max_tokens=25, ignore_eos=True, logit_bias={77: 1000.0}),
    ]
    engine = Engine(model, tokenizer, max_num_seqs=3, max_model_len=200, max_num_batched_tokens=131)
    first, second, third = outs = engine.generate(texts, params)
    assert len(set(first.token_ids)) == 30 and third.token_ids == [77] * 25
    assert all(len(top) == 3 and max(top, key=lambda pair: pair[1]) == top[0] for top in first.top_logprobs)
    assert second.top_logprobs is None and third.logprobs is None
    for text, p, out in zip(texts, params, outs, strict=True):
        alone = Engine(model, tokenizer, max_num_seqs=1, max_model_len=200).generate([text], p)[0]
        assert alone.token_ids == out.token_ids
