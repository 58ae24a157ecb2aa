"""Requests made from our own OpenAPI document: none may find a bug. What fuzzing found once is kept as tests below."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis")
ALWAYS = {"messages", "prompt", "input", "tokens"}
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def document(serve):
    return schemathesis.openapi.from_dict(serve.http.get("/openapi.json").json())


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_of_the_document_or_against_it_is_a_server_error(serve, document, path, mode):
    cases = document[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    documented = document.raw_schema["paths"][path]["post"]["responses"]

    @settings(max_examples=40, **QUIET)
    @given(cases, st.randoms(use_true_random=False), st.integers(0, 5))
    def check(case, rng, fields):
        body = case.body
        if (
            isinstance(body, dict) and mode == "positive"
        ):  # few fields at a time, and few tokens: or all is refused, or slow
            others = sorted(body.keys() - ALWAYS - {"model"})
            rng.shuffle(others)
            body = {name: value for name, value in body.items() if name in ALWAYS or name in others[:fields]}
            if path.startswith("/v1"):
                body["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = 2
        content = body if isinstance(body, bytes) else json.dumps(body, default=str)
        answer = serve.http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code < 500 and str(answer.status_code) in documented, (body, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]

    check()


def test_afterwards_nothing_is_held(serve):
    serve.until(serve.idle)


@pytest.mark.parametrize(
    "more",
    [
        {"metadata": {"a": "\ud800"}},
        {"metadata": {"a": 1e400}},
        {"tools": [{"type": "function", "name": "f", "parameters": {"d": 1e400}}]},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"const": "\ud800"}}}},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"const": 1e400}}}},
    ],
)
def test_what_no_answer_could_hold_is_refused_before_it_is_asked(serve, more):
    body = json.dumps({"input": "hi", "max_output_tokens": 2, **more}).replace("Infinity", "1e400")
    answer = serve.http.post("/v1/responses", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "the body" in answer.json()["error"]["message"]


def test_a_bug_of_ours_is_an_error_in_the_one_shape(serve, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(serve.service, "too_long", broken)
    answer = serve.chat(max_tokens=2)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    monkeypatch.undo()
    serve.until(serve.idle)
    assert serve.chat(max_tokens=2).status_code == 200
