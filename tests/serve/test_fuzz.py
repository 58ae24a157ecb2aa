"""Requests that are generated from the server's OpenAPI document, and tests of what fuzzing has found."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import force_answer

schemathesis = pytest.importorskip("schemathesis")
ALWAYS = {"messages", "prompt", "input", "tokens"}
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def document(serve):
    return schemathesis.openapi.from_dict(serve.http.get("/openapi.json").json())


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_fuzzed_requests_of_the_openapi_document_are_no_server_error(serve, document, path, mode):
    cases = document[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    documented = document.raw_schema["paths"][path]["post"]["responses"]

    @settings(max_examples=40, **QUIET)
    @given(cases, st.randoms(use_true_random=False), st.integers(0, 5))
    def check(case, rng, fields):
        body = case.body
        # Few fields at a time, or all is refused; few tokens, or it is slow.
        if isinstance(body, dict) and mode == "positive":
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


def test_fuzzing_leaves_nothing_allocated(serve):
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
def test_values_that_json_cannot_express_are_refused(serve, more):
    body = json.dumps({"input": "hi", "max_output_tokens": 2, **more}).replace("Infinity", "1e400")
    answer = serve.http.post("/v1/responses", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "the body" in answer.json()["error"]["message"]


def test_bug_in_the_server_is_500_in_the_usual_format(serve, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(serve.service, "check_prompt_length", broken)
    answer = serve.chat(max_tokens=2)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    monkeypatch.undo()
    serve.until(serve.idle)
    assert serve.chat(max_tokens=2).status_code == 200


TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {}}}},
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "u"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "r"},
    {"role": "user", "content": "hi"},
]
COMMON = {
    "model": "tiny",
    "stop": ["x"],
    "user": "u",
    "metadata": {"k": "v"},
    "seed": 1,
    "temperature": 0.5,
    "logit_bias": {"5": 1.0},
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"a": {"const": "c"}}}},
}
BODIES = [
    (
        "/v1/chat/completions",
        {"messages": TALK, "tools": [TOOL], "tool_choice": "auto", "max_tokens": 2, **COMMON},
    ),
    (
        "/v1/chat/completions",
        {
            "messages": TALK[-1:],
            "response_format": SCHEMA,
            "max_tokens": 2,
            "logprobs": True,
            "top_logprobs": 2,
        },
    ),
    (
        "/v1/chat/completions",
        {"messages": TALK[-1:], "structured_outputs": {"choice": ["a", "b"]}, "max_tokens": 2},
    ),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "echo": True, "logprobs": 1, **COMMON}),
    (
        "/v1/completions",
        {"prompt": "a", "max_tokens": 2, "guided_regex": "a+", "suffix": "", "cache_salt": "s"},
    ),
    (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "r"},
            ],
            "instructions": "i",
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
            "max_output_tokens": 2,
            "metadata": {"k": "v"},
            "text": {"format": {"type": "text"}},
            "model": "tiny",
        },
    ),
    ("/tokenize", {"messages": TALK, "tools": [TOOL], "model": "tiny"}),
    ("/detokenize", {"tokens": [1, 2], "model": "tiny"}),
]
LONG = "9" * 5000  # more digits than Python reads
RAW = [  # JSON texts, some of which are none: what no client's library writes
    r'"\ud800"',
    r'"\udc00\ud800"',
    r'"{\"a\": \"\\ud800\"}"',
    r'"\ud83d\ude00"',
    r'"\u0000"',
    '"\\uffff"',
    r'"<|\u202e"',
    '"<SPECIAL_12>"',
    "NaN",
    "-Infinity",
    "1e400",
    "-1e400",
    "1e-400",
    "0.1e1",
    "-0",
    "9" * 40,
    LONG,
    "1" + "0" * 400 + ".5",
    "true",
    "null",
    "{}",
    "[]",
    "[[[[]]]]",
    '{"$ref": "#"}',
    '{"a": {"__float__": "Infinity"}}',
    '"' + "x" * 5000 + '"',
    '{"5": 1e308}',
    f'{{"{LONG}": 1}}',
    "\ufeff1",
]


def places(value, path=()):
    """Every place in a JSON value, as a path."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def with_raw(value, changes, path=()):
    """The JSON text of a value, with raw text at some places."""
    if path in changes:
        return changes[path]
    if isinstance(value, dict):
        members = (
            f"{json.dumps(key)}: {with_raw(item, changes, (*path, key))}" for key, item in value.items()
        )
        return "{" + ", ".join(members) + "}"
    if isinstance(value, list):
        items = (with_raw(item, changes, (*path, index)) for index, item in enumerate(value))
        return "[" + ", ".join(items) + "]"
    return json.dumps(value)


def strictly(text):
    """Parse JSON text as strictly as any client does."""

    def refused(name):
        raise AssertionError(f"{name} is no JSON")

    value = json.loads(text, parse_constant=refused)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def check_answer(answer, stream):
    """Check that an answer has a status below 500 and is JSON, or a complete stream of JSON events."""
    text = answer.content.decode("utf-8")
    assert answer.status_code < 500, text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        value = strictly(text)
        assert answer.status_code == 200 or value["error"]["message"]
        return
    assert stream and answer.status_code == 200 and text.endswith("\n\n")
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    values = [strictly(event) for event in events if event != "[DONE]"]
    assert not any(
        value.get("error", {}).get("type") == "server_error" for value in values if value.get("error")
    )
    assert (
        events[-1] == "[DONE]"
        or "error" in values[-1]
        or values[-1]["type"] in ("response.completed", "response.incomplete")
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path, body", BODIES, ids=[f"{number}{path}" for number, (path, _) in enumerate(BODIES)]
)
def test_any_value_at_any_place_of_a_request_gets_json_below_500(serve, path, body, stream):
    body = body | (
        {"stream": True, "stream_options": {"include_usage": True}}
        if stream and "responses" not in path
        else {}
    )
    body |= {"stream": True} if stream and "responses" in path else {}
    if "tokenize" in path and stream:
        pytest.skip("not a stream")
    every = [place for place in places(body) if place]

    @settings(max_examples=60, **QUIET)
    @given(st.dictionaries(st.sampled_from(every), st.sampled_from(RAW), min_size=1, max_size=2))
    def check(changes):
        if any(place[-1] in ("max_tokens", "max_output_tokens") for place in changes):
            return  # a long answer takes its time and shows nothing more
        content = with_raw(body, changes).encode()
        check_answer(
            serve.http.post(path, content=content, headers={"content-type": "application/json"}), stream
        )

    check()
    assert serve.http.get("/health").status_code == 200
    serve.until(serve.idle)


@pytest.mark.parametrize(
    "place", [place for place in places(BODIES[0][1]) if place], ids=lambda place: ".".join(map(str, place))
)
def test_lone_surrogates_anywhere_in_a_request_are_refused(serve, place):
    content = with_raw(BODIES[0][1], {place: r'"\ud800"'})
    answer = serve.http.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and "half of a surrogate pair" in answer.json()["error"]["message"]


@pytest.mark.parametrize("order", ["name first", "arguments first", "in a string"])
@pytest.mark.parametrize(
    "value", [r'"\ud83d"', r'"\udc00\ud800"', "1e400", "NaN", '"a\nb"', "9" * 300, r'"\u0000"']
)
def test_any_tool_call_arguments_give_a_json_answer(serve, monkeypatch, value, order):
    arguments = '{"a": ' + value + "}"
    written = {
        "name first": '{"name": "f", "arguments": ' + arguments + "}",
        "arguments first": '{"arguments": ' + arguments + ', "name": "f"}',
        "in a string": '{"name": "f", "arguments": ' + json.dumps(arguments) + "}",
    }[order]
    force_answer(serve, monkeypatch, f"<TOOLCALL>[{written}]</TOOLCALL>")
    off = {"enable_thinking": False}
    ask = {"tools": [TOOL], "max_tokens": 900, "chat_template_kwargs": off}
    for stream in (False, True):
        check_answer(serve.chat(stream=stream, **ask), stream)
        body = {
            "input": "hi",
            "tools": [{"type": "function", "name": "f"}],
            "max_output_tokens": 900,
            "stream": stream,
        }
        check_answer(serve.http.post("/v1/responses", json=body | {"chat_template_kwargs": off}), stream)
    serve.until(serve.idle)


def test_logit_bias_token_of_5000_digits_is_refused(serve):
    answer = serve.chat(max_tokens=1, logit_bias={"9" * 5000: 1.0})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "logit_bias"


class Panic(BaseException):
    """What a Rust library raises: it is no Exception."""


def test_text_on_which_the_tokenizer_panics_is_refused(serve, monkeypatch):
    def panic(*_, **__):
        raise Panic("retry-limit-in-match over")

    monkeypatch.setattr(type(serve.service.llm.template), "encode", panic)
    answer = serve.chat(max_tokens=1)
    assert (
        answer.status_code == 400 and "Panic: retry-limit-in-match over" in answer.json()["error"]["message"]
    )
    monkeypatch.undo()
    assert serve.chat(max_tokens=1).status_code == 200
