import pytest
import torch

from nanohybrid.engine import scoring
from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams

PROMPTS = [list(range(30, 30 + length)) for length in (1, 2, 7, 200)]


def reference(model, prompt):
    """log_softmax of one forward over the prompt, [T, V]."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt]))[0]
    return logits_TV.double().log_softmax(-1)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("values", [1, 1000, 1 << 22])
def test_prompt_logprobs_equal_those_of_one_forward(model, tokenizer, monkeypatch, values, deterministic):
    monkeypatch.setattr(scoring, "LOGITS", values)
    engine = Engine(
        model,
        tokenizer,
        max_num_seqs=4,
        max_model_len=512,
        max_num_batched_tokens=140,
        deterministic=deterministic,
    )
    plain = engine.generate(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True))
    scored = engine.generate(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=2))
    for prompt, one, without in zip(PROMPTS, scored, plain, strict=True):
        wanted = reference(model, prompt)
        assert one.token_ids == without.token_ids and without.prompt_logprobs is None
        assert len(one.prompt_logprobs) == len(one.prompt_top_logprobs) == len(prompt) - 1
        for at, (logprob, top) in enumerate(zip(one.prompt_logprobs, one.prompt_top_logprobs, strict=True)):
            assert logprob == pytest.approx(wanted[at, prompt[at + 1]].item(), abs=1e-4)
            assert [token for token, _ in top] == wanted[at].topk(2).indices.tolist()


def test_prompt_logprobs_are_shared_by_n_completions_and_ignore_the_prefix_cache(model, tokenizer):
    engine = Engine(model, tokenizer, max_num_seqs=3, max_model_len=512, prefix_cache_bytes=1 << 26)
    params = SamplingParams(max_tokens=2, temperature=1.0, seed=1, prompt_logprobs=0, ignore_eos=True)
    engine.generate([PROMPTS[3]], SamplingParams(max_tokens=1))
    first = engine.add_choices(PROMPTS[3], SamplingParams(**{**params.__dict__, "n": 3}))
    engine.step()
    engine.cancel(first[0])
    while engine.busy:
        engine.step()
    done = [request.completion() for request in first[1:]]
    assert done[0].prompt_logprobs == done[1].prompt_logprobs and len(done[0].prompt_logprobs) == 199
    assert done[0].cached_tokens == 0 and done[0].prompt_logprobs[5] == pytest.approx(
        reference(model, PROMPTS[3])[5, 36].item(), abs=1e-4
    )
