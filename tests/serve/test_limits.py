import contextlib
import json

import pytest
from serving import httpx, started

from nanohybrid.serve.limits import Limits, json_depth
from nanohybrid.serve.service import Settings

SMALL = Limits(
    max_body_bytes=20_000,
    max_header_bytes=2000,
    max_headers=20,
    max_json_depth=20,
    max_messages=3,
    max_tools=2,
    max_schema_bytes=500,
    max_schema_depth=5,
    max_stops=2,
    max_stop_bytes=8,
    max_logit_bias=2,
    max_n=2,
    max_prompts=3,
    max_regex_bytes=50,
    max_regex_repeats=100,
    max_logprobs=3,
    max_connections=50,
    body_seconds=0.5,
)
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def serve():
    with started(Settings(model_name="tiny", max_queue=4), SMALL, max_model_len=256) as running:
        yield running


def tool(parameters=None, name="f"):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


def choice(name):
    return {"type": "function", "function": {"name": name}}


def answer_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        # sizes: each of the limits
        ({"messages": HI["messages"] * 4}, "messages"),
        ({"tools": [tool()] * 3}, "tools"),
        ({"tools": [tool({"description": "x" * 600})]}, "tools[0].function.parameters"),
        ({"tools": [tool(), tool(nested(6))]}, "tools[1].function.parameters"),
        ({"tools": [tool({"$ref": "#/nowhere"})]}, "tools[0].function.parameters"),
        ({"tools": [tool({"$ref": "https://example.com/a.json"})]}, "tools[0].function.parameters"),
        ({"response_format": answer_schema({"$ref": "#/$defs/x"})}, "response_format.json_schema.schema"),
        ({"stop": ["a"] * 3}, "stop"),
        ({"stop": "x" * 9}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias"),
        ({"n": 3}, "n"),
        ({"logprobs": True, "top_logprobs": 4}, "top_logprobs"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        # ranges and kinds
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e999}, None),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"seed": 1 << 63}, "seed"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"bear": 1}}, "logit_bias"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"thinking_grace": -1}, "thinking_grace"),
        ({"reasoning_effort": "vast"}, "reasoning_effort"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "emperor", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
        ({"tools": [tool()], "tool_choice": choice("rm")}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        # what a request may not bring
        ({"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"logits_processors": ["os.system"]}, "logits_processors"),
        ({"cache_salt": "x" * 300}, "cache_salt"),
    ],
)
def test_chat_refusals_name_the_field(serve, more, param):
    body = json.dumps({**HI, **more}).replace("Infinity", "1e999")
    answer = serve.http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error" and error["message"]
    assert (error["param"] or "").startswith(param or ""), error


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [10**6]}, None),
        ({}, "prompt"),
        ({"prompt": ["a", "b", "c", "d"]}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "structured_outputs": {"regex": "a" * 60}}, "structured_outputs.regex"),
        ({"prompt": "a", "guided_regex": "("}, None),
        ({"prompt": "a", "guided_regex": "(a{11}){0,10}"}, "guided_regex"),
        (
            {"prompt": "a", "structured_outputs": {"json": {"pattern": "(a{2,9}){99999999999999}"}}},
            "structured_outputs.json",
        ),
        ({"prompt": "a", "structured_outputs": {"choice": ["a" * 60]}}, "structured_outputs.choice"),
        ({"prompt": "a", "structured_outputs": {"json": nested(6)}}, "structured_outputs.json"),
        ({"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"prompt": "a", "structured_outputs": {}}, "structured_outputs"),
        ({"prompt": ["a", "b"], "n": 2}, "prompt"),
        ({"prompt": "a", "logprobs": 4}, "logprobs"),
        ({"prompt": "a", "best_of": 5}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "x" * 300}, "messages"),
    ],
)
def test_completion_refusals_name_the_field(serve, more, param):
    answer = serve.http.post("/v1/completions", json={"max_tokens": 2, **more})
    assert answer.status_code == 400 and (answer.json()["error"]["param"] or "").startswith(param or ""), (
        answer.text
    )


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"messages": "\xff"}', 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b'{"temperature": NaN}', 400),
        (b'{"n": 1' + b"0" * 5000 + b"}", 400),
        (b"[" * 19_000, 400),
        (b'{"a":' * 30 + b"1" + b"}" * 30, 400),
        (b'{"x": "' + b"x" * 30_000 + b'"}', 413),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "hi"}], "metadata": {"\\uDFFF": 1}}', 400),
        (b'{"messages": [{"role": "user", "content": "hi"}], "metadata": {"a": 1e400}}', 400),
        (b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}], "max_tokens": 2}', 200),
    ],
)
def test_bad_body_is_refused_before_it_is_parsed(serve, content, status):
    answer = serve.http.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status and (status == 200 or answer.json()["error"]["message"]), answer.text


def test_body_of_unknown_length_is_limited(serve):
    chunks = (b"x" * 5000 for _ in range(10))
    answer = serve.http.post(
        "/v1/chat/completions", content=chunks, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_body_that_does_not_arrive_is_408(serve):
    import socket

    with socket.create_connection(serve.url.removeprefix("http://").split(":")) as connection:
        connection.settimeout(10)
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += "content-length: 100\r\n\r\n{"
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(4096)


def test_headers_have_limits_and_only_json_is_accepted(serve):
    assert serve.http.get("/v1/models", headers={f"x-{i}": "y" for i in range(30)}).status_code == 431
    assert serve.http.get("/v1/models", headers={"x": "y" * 3000}).status_code == 431
    # h11 answers 400 and closes, perhaps before all was sent.
    with contextlib.suppress(httpx.ReadError, httpx.WriteError):
        assert serve.http.get("/v1/models", headers={"x": "y" * 200_000}).status_code in (400, 431)
    assert (
        serve.http.post(
            "/v1/chat/completions", content=json.dumps(HI), headers={"content-type": "text/plain"}
        ).status_code
        == 415
    )


def test_foreign_origin_is_403(serve):
    assert (
        serve.http.post(
            "/v1/chat/completions", json=HI, headers={"origin": "https://example.com"}
        ).status_code
        == 403
    )
    assert serve.http.post("/v1/chat/completions", json=HI, headers={"origin": serve.url}).status_code == 200


def test_unknown_route_and_method_are_errors_in_the_usual_format(serve):
    assert serve.http.get("/v2/nothing").json()["error"]["type"] == "not_found_error"
    assert serve.http.get("/v1/chat/completions").status_code == 405


def test_server_answers_after_all_refusals(serve):
    assert serve.http.post("/v1/chat/completions", json=HI).status_code == 200 and serve.idle()


@pytest.mark.parametrize(
    "body", [b'{"a": "[[[["}', rb'{"a": "\"[[[["}', b'{"a": ["\\\\", []]}', b"{}", b'"[[[[', b"]]]]"]
)
def test_json_depth_counts_brackets_outside_strings_only(body):
    assert json_depth(body, 3)


@pytest.mark.parametrize("body", [b"[[[[", b'{"a": [[{', rb'"\\"[[[['])
def test_json_depth_needs_no_parsing(body):
    assert not json_depth(body, 3)
