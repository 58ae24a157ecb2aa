"""A step that raises fails its requests, and the server continues; it ends where the engine is broken."""

import concurrent.futures
import json

import pytest
from serving import sse, started

ASK = {"max_tokens": 40, "ignore_eos": True, "temperature": 0}


def fail_once(serve, monkeypatch, error, owner, name, wanted=lambda *_: True):
    """Let one call of a method raise."""
    original, failed = getattr(owner, name), []

    def failing(*arguments, **more):
        if not failed and wanted(*arguments):
            failed.append(True)
            raise error
        return original(*arguments, **more)

    monkeypatch.setattr(owner, name, failing)
    return failed


@pytest.mark.parametrize("stream", [False, True])
def test_step_that_raises_fails_its_requests_and_the_server_continues(serve, monkeypatch, capfd, stream):
    loop = serve.service.loop
    decoding = lambda work: all(start for _, start, _ in work)  # noqa: E731  in the middle of an answer
    failed = fail_once(serve, monkeypatch, ZeroDivisionError("a bug"), loop.engine.runner, "run", decoding)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = [one.result() for one in [pool.submit(serve.chat, stream=stream, **ASK) for _ in range(3)]]
    assert failed and any("step_failed" in answer.text for answer in answers)
    for answer in answers:
        if stream and "step_failed" in answer.text:
            assert answer.status_code == 200
            assert json.loads(answer.text.split("data: ")[-1])["error"]["code"] == "step_failed"
        else:
            assert answer.status_code == 200 or answer.json()["error"]["code"] == "step_failed"
    assert serve.http.get("/health").status_code == 200 and loop.dead is None
    serve.until(serve.idle)
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err


def test_answers_after_a_failed_step_are_unchanged(serve, monkeypatch):
    before = serve.chat(**ASK).json()["choices"][0]["message"]
    loop = serve.service.loop
    fail_once(serve, monkeypatch, ZeroDivisionError("a bug"), loop.engine.runner, "run")
    assert serve.chat("something else", n=3, **ASK).json()["error"]["code"] == "step_failed"
    assert serve.chat(**ASK).json()["choices"][0]["message"] == before
    serve.until(serve.idle)


def test_error_after_a_step_leaves_no_request_waiting(serve, monkeypatch):
    loop = serve.service.loop
    serve.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(serve.chat, max_tokens=1) for _ in range(4)]
        serve.until(lambda: loop.num_admitted == 4)
        fail_once(
            serve,
            monkeypatch,
            ZeroDivisionError("a bug"),
            loop,
            "_delta",
            lambda stream, _: stream.num_sent == 0,
        )
        serve.gate.set()
        answers = [one.result(20) for one in asked]
    assert {answer.status_code for answer in answers} <= {200, 500}
    assert any("step_failed" in answer.text for answer in answers)
    serve.until(serve.idle)


def test_request_that_the_engine_cannot_add_fails_alone(serve, monkeypatch):
    loop = serve.service.loop
    fail_once(serve, monkeypatch, ZeroDivisionError("a bug"), loop.engine, "add_choices")
    assert serve.chat(max_tokens=2).status_code == 500
    assert serve.chat(max_tokens=2).status_code == 200
    serve.until(serve.idle)


def test_prompt_ids_out_of_range_are_refused(serve):
    answer = serve.http.post("/v1/completions", json={"prompt": [1, 269], "max_tokens": 1})
    assert answer.status_code == 400
    serve.service.llm.tokenizer.bos_id, before = 10**6, serve.service.llm.tokenizer.bos_id
    try:
        answer = serve.http.post("/v1/completions", json={"prompt": "", "max_tokens": 1})
    finally:
        serve.service.llm.tokenizer.bos_id = before
    assert answer.status_code in (200, 400)
    assert serve.http.get("/health").status_code == 200
    serve.until(serve.idle)


class Panic(BaseException):
    """What a Rust library raises: it is no Exception."""


def test_panic_ends_the_server_and_answers_all_requests():
    with started() as serve:

        def panic():
            raise Panic("unreachable")

        serve.service.loop.engine.step = panic
        assert "engine_dead" in serve.chat(max_tokens=3).text
        assert serve.http.get("/health").status_code == 503
        serve.until(lambda: serve.server.should_exit)


def test_bug_while_streaming_ends_the_stream_with_an_error(serve, monkeypatch):
    """No client may take an exception while events are written for the end of the answer."""

    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("nanohybrid.serve.chat._delta", broken)
    answer = serve.chat(max_tokens=3, stream=True, ignore_eos=True)
    assert json.loads(answer.text.split("data: ")[-1])["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert sse(serve.chat(max_tokens=3, stream=True))
    serve.until(serve.idle)
