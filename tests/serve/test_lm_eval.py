"""lm-eval against the server. Runs where it is installed (see CONTRIBUTING.md); it is not a requirement."""

import json

import pytest
import torch

pytest.importorskip(
    "lm_eval.models.openai_completions",
    reason="lm-eval is not installed; CONTRIBUTING.md says how to run this",
)

from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

TEXTS = [("to be or", " not to be"), ("a", " b"), ("grü", "ße 42"), ("x y z", " w"), ("", "begin")]


def asked(kind, *arguments):
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


@pytest.fixture(scope="module")
def completions(serve, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    serve.service.llm.tokenizer.save(directory)
    return LocalCompletionsAPI(
        base_url=f"{serve.url}/v1/completions",
        model="tiny",
        tokenizer=str(directory),
        batch_size=2,
        max_length=512,
        max_retries=1,
    )


def test_lm_eval_log_likelihoods_equal_those_of_the_model(serve, completions):
    found = completions.loglikelihood(asked("loglikelihood", *TEXTS))
    for (context, continuation), (logprob, greedy) in zip(TEXTS, found, strict=True):
        ids, whole = (
            completions.tok_encode(context) or [completions.prefix_token_id],
            completions.tok_encode(context + continuation),
        )
        ids, rest = (ids, whole[len(ids) :]) if context else (ids, whole)
        with torch.no_grad():
            logits_TV = serve.service.llm.model(torch.tensor([ids + rest]))[0, len(ids) - 1 : -1].double()
        wanted = logits_TV.log_softmax(-1)[range(len(rest)), rest]
        assert logprob == pytest.approx(wanted.sum().item(), abs=1e-3) and not greedy
    serve.until(serve.idle)


def test_lm_eval_generation_equals_that_of_the_model(serve, completions):
    until = {"until": ["\n"], "max_gen_toks": 12, "temperature": 0.0}
    found = completions.generate_until(asked("generate_until", *((text, until) for text, _ in TEXTS[:4])))
    for (text, _), continuation in zip(TEXTS, found, strict=False):
        ask = {"prompt": completions.tok_encode(text), "max_tokens": 12, "temperature": 0, "stop": ["\n"]}
        assert continuation == serve.http.post("/v1/completions", json=ask).json()["choices"][0]["text"]


def test_lm_eval_chat_is_answered(serve):
    chat = LocalChatCompletion(
        base_url=f"{serve.url}/v1/chat/completions", model="tiny", tokenizer_backend=None, max_length=512
    )
    messages = JsonChatStr(json.dumps([{"role": "user", "content": "hi /no_think"}]))
    continuation = chat.generate_until(
        asked("generate_until", (messages, {"until": ["zzzz"], "max_gen_toks": 9, "temperature": 0.0}))
    )
    wanted = serve.chat("hi /no_think", max_tokens=9, temperature=0, stop=["zzzz"]).json()
    assert continuation == [wanted["choices"][0]["message"]["content"]]
