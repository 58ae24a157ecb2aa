"""Structured output over HTTP: fields that ask for it, and refusals. tests/engine checks the grammars."""

import json
import re

import pytest
from serving import sse, started

from nanohybrid.serve.limits import Limits

pytest.importorskip("llguidance")
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "integer", "minimum": 0, "maximum": 99} for name in "ab"},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
NOW = {
    "type": "function",
    "function": {
        "name": "now",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
RATE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "score": {"enum": [1, 2, 3]}},
    "required": ["city", "score"],
    "additionalProperties": False,
}
ASK = {"max_tokens": 200, "temperature": 1.0, "thinking_budget": 5, "thinking_grace": 0}


def schema(value):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("thinking", [True, False])
def test_json_schema_constrains_the_answer_after_thinking(serve, seed, thinking):
    answer = serve.chat(
        **ASK, seed=seed, response_format=schema(RATE), chat_template_kwargs={"enable_thinking": thinking}
    ).json()
    value = json.loads(answer["choices"][0]["message"]["content"])
    assert set(value) == {"city", "score"} and value["score"] in (1, 2, 3) and len(value["city"]) <= 6
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0) == thinking


def test_json_schema_answer_follows_a_trace_that_wants_to_end_the_text(serve):
    """EOS is made the most probable token: it must not come before the constrained answer."""
    eos = serve.service.llm.tokenizer.eos_id
    ask = {**ASK, "temperature": 0, "logit_bias": {str(eos): 100}, "thinking_budget": 20}
    assert serve.chat(**ask).json()["choices"][0]["message"]["content"] == ""
    answer = serve.chat(**ask, response_format=schema(RATE)).json()
    assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"city", "score"}
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 20


def test_json_schema_constrains_each_of_n_choices(serve):
    answer = serve.chat(**ASK, seed=1, n=4, response_format=schema(RATE)).json()
    assert len({c["message"]["content"] for c in answer["choices"]}) > 1
    assert all(set(json.loads(c["message"]["content"])) == {"city", "score"} for c in answer["choices"])
    serve.until(serve.idle)
    assert not serve.service.loop.engine.scheduler.running


def test_required_tool_call_is_made_and_streamed(serve):
    choice = serve.chat(**ASK, seed=2, tools=[ADD, NOW], tool_choice="required").json()["choices"][0]
    call = choice["message"]["tool_calls"][0]["function"]
    assert choice["finish_reason"] == "tool_calls" and call["name"] in ("add", "now")
    named = {"type": "function", "function": {"name": "add"}}
    chunks = sse(serve.chat(**ASK, seed=3, tools=[ADD, NOW], tool_choice=named, stream=True))
    pieces = [
        call["function"]
        for chunk in chunks
        for c in chunk["choices"]
        for call in c["delta"].get("tool_calls", [])
    ]
    arguments = json.loads("".join(piece["arguments"] for piece in pieces))
    assert (
        pieces[0]["name"] == "add"
        and set(arguments) == {"a", "b"}
        and all(0 <= value <= 99 for value in arguments.values())
    )


def test_logprobs_of_a_constrained_answer_are_json(serve):
    answer = serve.chat(**ASK, response_format=schema(RATE), logprobs=True, top_logprobs=4)
    assert (
        answer.status_code == 200
        and min(t["logprob"] for t in answer.json()["choices"][0]["logprobs"]["content"]) > -9999
    )


@pytest.mark.parametrize("thinking", [True, False])
def test_regex_constrains_the_whole_answer(serve, thinking):
    pattern = r"(19|20)[0-9]{2}-[a-f]{2,4}(é|ß)?"
    for form in ({"structured_outputs": {"regex": pattern}}, {"guided_regex": pattern}):
        answers = [
            serve.chat(**ASK, seed=seed, chat_template_kwargs={"enable_thinking": thinking}, **form).json()
            for seed in range(3)
        ]
        assert all(re.fullmatch(pattern, answer["choices"][0]["message"]["content"]) for answer in answers)
    text = serve.http.post(
        "/v1/completions", json={**ASK, "prompt": "a", "structured_outputs": {"regex": pattern}}
    ).json()
    assert re.fullmatch(pattern, text["choices"][0]["text"])


def test_choice_and_json_constrain_the_answer(serve):
    texts = ["yes", 'no "maybe"', "über\n"]
    form = {"structured_outputs": {"choice": texts}, "chat_template_kwargs": {"enable_thinking": False}}
    texts_seen = {
        serve.chat(**ASK, seed=seed, **form).json()["choices"][0]["message"]["content"] for seed in range(12)
    }
    assert texts_seen <= {text.strip() for text in texts} and len(texts_seen) > 1
    answer = serve.chat(**ASK, seed=1, structured_outputs={"json": RATE}).json()["choices"][0]["message"][
        "content"
    ]
    assert set(json.loads(answer)) == {"city", "score"}


def test_serve_deterministic_with_structured_output():
    with started(max_model_len=512, deterministic=True) as serve:
        answer = serve.chat(**ASK, seed=1, response_format=schema(RATE)).json()
        assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"city", "score"}


def test_grammar_too_complex_fails_its_own_request_only():
    ask = {
        **ASK,
        "chat_template_kwargs": {"enable_thinking": False},
        "structured_outputs": {"regex": "(a{1000}){1000}"},
    }
    with started(limits=Limits(max_regex_repeats=1 << 20)) as serve:
        answer = serve.chat(**ask, stream=True)
        assert json.loads(answer.text.split("data: ")[-1])["error"]["code"] == "grammar_too_complex"
        assert serve.chat(**ASK).status_code == 200
        serve.until(serve.idle)


@pytest.mark.parametrize(
    "bad",
    [
        {"response_format": schema({"type": "integer", "minimum": 5, "maximum": 1})},
        {"response_format": schema({"type": "nonsense"})},
        {"response_format": schema(RATE), "ignore_eos": True},
        {"response_format": schema(RATE), "structured_outputs": {"regex": "a"}},
        {"guided_regex": "a", "structured_outputs": {"regex": "a"}},
        {"structured_outputs": {"regex": "(?=a)b"}},
        {"response_format": schema(RATE), "tools": [ADD], "tool_choice": "required"},
    ],
)
def test_structured_output_that_cannot_be_compiled_is_refused(serve, bad):
    answer = serve.chat(**ASK, **bad)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
