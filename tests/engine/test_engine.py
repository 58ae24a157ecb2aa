import random
from dataclasses import replace

import pytest
import torch
from engine_helpers import greedy_reference, is_idle

from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams
from nanohybrid.errors import InputError, NanohybridError
from nanohybrid.model import Layout

LENGTHS = (1, 2, 3, 17, 127, 128, 129, 300)
PARAMS = [
    SamplingParams(max_tokens=12, ignore_eos=True),
    SamplingParams(max_tokens=9, ignore_eos=True, temperature=1.0, seed=11, logprobs=True),
    SamplingParams(max_tokens=15, ignore_eos=True, temperature=0.8, top_p=0.9, seed=12),
    SamplingParams(max_tokens=5, ignore_eos=True, temperature=1.5, top_k=20, min_p=0.01, seed=13),
]


def prompts(seed=0, lengths=LENGTHS):
    rng = random.Random(seed)
    return [[rng.randrange(13, 269) for _ in range(length)] for length in lengths]


def test_generate_equals_the_whole_forward_token_by_token(model, tokenizer):
    texts = prompts()
    engine = Engine(model, tokenizer, max_num_seqs=3, max_model_len=400, max_num_batched_tokens=131)
    for prompt, out in zip(texts, engine.generate(texts, PARAMS[0]), strict=True):
        assert out.token_ids == greedy_reference(model, prompt, 12)[0]
        assert (out.finish_reason, out.prompt_tokens) == ("length", len(prompt))
    assert is_idle(engine)


def test_generate_same_seed_same_text_in_any_batch_and_order(model, tokenizer):
    texts = prompts(1)
    params = [PARAMS[i % 4] for i in range(len(texts))]
    wanted = [
        Engine(model, tokenizer, max_num_seqs=1, max_model_len=400).generate([t], p)[0]
        for t, p in zip(texts, params, strict=True)
    ]
    for running, budget, order_seed in ((8, 2048, 0), (3, 140, 1), (5, 400, 2)):
        order = random.Random(order_seed).sample(range(len(texts)), len(texts))
        engine = Engine(
            model, tokenizer, max_num_seqs=running, max_model_len=400, max_num_batched_tokens=budget
        )
        got = engine.generate([texts[i] for i in order], [params[i] for i in order])
        for out, i in zip(got, order, strict=True):
            assert (out.token_ids, out.text) == (wanted[i].token_ids, wanted[i].text)
            if out.logprobs:
                assert out.logprobs == pytest.approx(wanted[i].logprobs, abs=1e-4)
        assert is_idle(engine)


def test_chunked_prefill_leaves_the_state_of_a_whole_one(model, tokenizer):
    prompt = prompts(2, [390])[0]
    states = []
    for budget in (512, 129, 257):
        engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=400, max_num_batched_tokens=budget)
        request = engine.add(prompt, SamplingParams(max_tokens=2))
        while not request.tokens:
            engine.step()
        states.append([pool.clone() for layer in engine.runner.state.layers for pool in layer.values()])
    for other in states[1:]:
        for a, b in zip(states[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cancel_frees_everything_and_changes_no_other_request(model, tokenizer):
    texts = prompts(3, (5, 300, 40, 200))
    engine = Engine(model, tokenizer, max_num_seqs=2, max_model_len=400, max_num_batched_tokens=140)
    wanted = engine.generate([texts[2]], PARAMS[2])[0].token_ids
    requests = [engine.add(text, PARAMS[2]) for text in texts]
    engine.step()
    engine.cancel(requests[0])  # decoding
    engine.cancel(requests[1])  # in the middle of its prompt
    engine.cancel(requests[3])  # waiting
    engine.cancel(requests[3])
    while engine.busy:
        engine.step()
    assert requests[2].completion().token_ids == wanted and is_idle(engine)
    engine.cancel(requests[2])  # finished: nothing happens


def test_stream_that_is_closed_frees_its_slot(model, tokenizer):
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=400)
    stream = engine.stream(prompts(4)[3], replace(PARAMS[0], max_tokens=300))
    next(stream)
    assert not is_idle(engine)
    stream.close()
    assert is_idle(engine)


def test_stream_adds_up_to_the_text(model, tokenizer):
    prompt = prompts(4)[4]
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=4, ignore_eos=True)
    engine = Engine(model, tokenizer, max_num_seqs=2, max_model_len=400)
    whole = engine.generate([prompt], params)[0].text
    assert "".join(engine.stream(prompt, params)) == whole
    stop = whole[20:23]
    cut = engine.generate([prompt], replace(params, stop=(stop,)))[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    assert "".join(engine.stream(prompt, replace(params, stop=(stop,)))) == cut.text


def test_stop_id_ends_the_text_before_itself(model, tokenizer):
    prompt = prompts(5)[3]
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=400)
    free = engine.generate([prompt], PARAMS[0])[0]
    stop = free.token_ids[4]
    cut = engine.generate([prompt], replace(PARAMS[0], stop_ids=(stop,)))[0]
    end = free.token_ids.index(stop)
    assert cut.token_ids == free.token_ids[: end + 1] and cut.text == tokenizer.decode(free.token_ids[:end])


def test_thinking_budgets_hold_alone_and_in_a_batch(model, tokenizer):
    prompt = tokenizer.encode("Assistant\n<think>\n")
    params = [
        SamplingParams(
            max_tokens=60, temperature=1.0, seed=s, thinking_budget=b, thinking_grace=g, ignore_eos=True
        )
        for s in range(4)
        for b, g in ((0, 5), (7, 0), (7, 20))
    ]
    engine = Engine(model, tokenizer, max_num_seqs=5, max_model_len=100)
    outs = engine.generate([prompt] * len(params), params)
    for p, out in zip(params, outs, strict=True):
        assert out.text.count("</think>\n\n") == 1 and out.thinking_end in ("newline", "forced")
        assert (
            p.thinking_budget
            <= out.thinking_tokens
            <= p.thinking_budget + p.thinking_grace * (p.thinking_budget > 0)
        )
        assert out.forced.start == out.thinking_tokens and tokenizer.decode(
            [out.token_ids[i] for i in out.forced]
        ).endswith("</think>\n\n")
        trace = tokenizer.decode(out.token_ids[: out.thinking_tokens])
        assert (out.thinking_end == "newline") == (trace.endswith("\n") or p.thinking_budget == 0)
        alone = engine.generate([prompt], p)[0]
        assert alone == out


def test_answer_continues_from_forced_tokens(model, tokenizer):
    prompt = tokenizer.encode("x<think>")
    params = SamplingParams(max_tokens=40, thinking_budget=0, ignore_eos=True)
    out = Engine(model, tokenizer, max_num_seqs=1, max_model_len=100).generate([prompt], params)[0]
    opened = prompt + tokenizer.encode("\n</think>\n\n")
    assert prompt + out.token_ids == opened + greedy_reference(model, opened, 40 - len(out.forced))[0]


def test_logprobs_equal_those_of_the_training_forward(model, tokenizer):
    prompt = prompts(6)[3]
    params = SamplingParams(
        max_tokens=20, temperature=1.0, seed=9, logprobs=True, ignore_eos=True, thinking_budget=3
    )
    out = Engine(model, tokenizer, max_num_seqs=1, max_model_len=100).generate([prompt], params)[0]
    tokens = torch.tensor(prompt + out.token_ids)
    with torch.inference_mode():
        logp = model.head(model.hidden(tokens, Layout.packed([len(tokens)]))).log_softmax(-1)
    wanted = logp[len(prompt) - 1 : -1].gather(1, tokens[len(prompt) :, None])[:, 0].tolist()
    assert out.logprobs == pytest.approx(wanted, abs=2e-4)


def test_prompt_beyond_max_model_len_is_refused_and_frees_all_slots(model, tokenizer):
    engine = Engine(model, tokenizer, max_num_seqs=2, max_model_len=100)
    with pytest.raises(InputError, match="more than the context of 100"):
        engine.generate([[20] * 5, [20] * 90], SamplingParams(max_tokens=11))
    assert is_idle(engine)


def test_generate_raises_where_logits_are_not_finite(model, tokenizer):
    import copy

    broken = copy.deepcopy(model)
    broken.head_weight.data[40] = float("nan")
    engine = Engine(broken, tokenizer, max_num_seqs=2, max_model_len=100)
    with pytest.raises(NanohybridError, match="not numbers"):
        engine.generate([[20] * 5, [20] * 9], PARAMS[0])
    assert is_idle(engine)


def test_generate_progress_counts_every_prompt_once(model, tokenizer):
    told = []
    Engine(model, tokenizer, max_num_seqs=3, max_model_len=400).generate(
        prompts(7), PARAMS[:1] * 8, told.append
    )
    assert sum(told) == 8
