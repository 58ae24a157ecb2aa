import concurrent.futures
import contextlib
import json
import socket
import threading
import time

import pytest
from serving import httpx, started

from nanohybrid.engine.engine import not_finite
from nanohybrid.serve.limits import Limits
from nanohybrid.serve.service import Settings

LONG = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 900,
    "ignore_eos": True,
    "stream": True,
}


def leave_after(serve, lines, body=LONG):
    """Be a client that disconnects after some lines of a stream."""
    with httpx.stream("POST", f"{serve.url}/v1/chat/completions", json=body, timeout=30) as answer:
        for count, _ in enumerate(answer.iter_lines()):
            if count >= lines:
                return answer.status_code


@pytest.mark.parametrize("n", [1, 3])
def test_disconnect_while_streaming_frees_the_slot_within_a_step(serve, n):
    assert leave_after(serve, 6 * n, {**LONG, "n": n}) == 200
    serve.until(serve.idle, 5)


def test_disconnect_before_the_first_token_cancels_the_request(serve):
    serve.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{serve.url}/v1/chat/completions", json={**LONG, "stream": False}, timeout=0.3)
    serve.until(lambda: serve.service.loop.num_admitted == 0)
    steps = []
    step = serve.service.loop.engine.step
    serve.service.loop.engine.step = lambda: steps.append(1) or step()
    serve.gate.set()
    serve.until(serve.idle, 5)
    serve.service.loop.engine.step = step
    assert len(steps) <= 1


def test_disconnect_while_queued_leaves_the_queue(serve):
    serve.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        first = [pool.submit(leave_after, serve, 4) for _ in range(6)]  # four run, two wait
        serve.until(lambda: serve.service.loop.num_admitted == 6)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{serve.url}/v1/chat/completions", json={**LONG, "stream": False}, timeout=0.3)
        serve.until(lambda: serve.service.loop.num_admitted == 6)
        serve.gate.set()
        assert [one.result() for one in first] == [200] * 6
    serve.until(serve.idle, 5)


def test_full_queue_is_429_with_retry_after(serve):
    serve.gate.clear()
    short = {**LONG, "stream": False, "max_tokens": 3}
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        asked = [
            pool.submit(httpx.post, f"{serve.url}/v1/chat/completions", json=short, timeout=30)
            for _ in range(20)
        ]
        serve.until(lambda: sum(one.done() for one in asked) == 8)  # 4 running and 8 queued have places
        serve.gate.set()
        answers = [one.result() for one in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert sorted(answer.status_code for answer in answers) == [200] * 12 + [429] * 8
    assert all(
        int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["type"] == "rate_limit_error"
        for answer in refused
    )
    serve.until(serve.idle)


def test_slow_reader_delays_no_other_request(serve):
    with httpx.stream("POST", f"{serve.url}/v1/chat/completions", json=LONG, timeout=30):
        begin = time.monotonic()
        assert serve.chat(max_tokens=5).status_code == 200
        assert time.monotonic() - begin < 5
    serve.until(serve.idle)


def test_queue_and_request_deadlines():
    limits = Limits(queue_seconds=0.2, request_seconds=1.0)
    with started(limits=limits, max_num_seqs=1, max_model_len=4096) as serve:
        step = serve.service.loop.engine.step
        serve.service.loop.engine.step = lambda: (time.sleep(0.02), step())[1]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            slow = pool.submit(serve.chat, max_tokens=3000, ignore_eos=True)
            serve.until(lambda: serve.service.loop.running == 1)
            queued = serve.chat(max_tokens=2)
            assert queued.status_code == 429 and "no slot" in queued.json()["error"]["message"]
            assert slow.result().status_code == 504
        serve.until(serve.idle)
        text = serve.chat(max_tokens=3000, ignore_eos=True, stream=True).text
        assert json.loads(text.split("data: ")[-1])["error"]["code"] == "deadline"
        serve.until(serve.idle)


def test_non_finite_logits_fail_their_own_request_only(serve):
    engine = serve.service.loop.engine
    step = engine.step

    def broken():
        advanced = step()
        for request in advanced:
            if request.params.seed == 666 and not request.finished:
                engine.scheduler.remove(request)
                request.fail(not_finite(len(request.tokens)))
        return advanced

    engine.step = broken
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            good = pool.submit(serve.chat, max_tokens=20, ignore_eos=True)
            assert serve.chat(max_tokens=20, seed=666).json()["error"]["code"] == "not_finite"
            assert "not_finite" in serve.chat(max_tokens=20, seed=666, stream=True).text
            assert good.result().status_code == 200
    finally:
        engine.step = step
    serve.until(serve.idle)


def test_dead_engine_fails_requests_and_health_and_ends_the_server(capfd):
    with started() as serve:
        serve.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            whole, stream = (
                pool.submit(serve.chat, max_tokens=50),
                pool.submit(serve.chat, max_tokens=50, stream=True),
            )
            serve.until(lambda: serve.service.loop.num_admitted == 2)

            def die():
                raise RuntimeError("a sticky error")

            serve.service.loop.engine.step = die
            serve.gate.set()
            assert whole.result().status_code == 500 and "engine_dead" in whole.result().text
            assert "engine_dead" in stream.result().text
        assert serve.http.get("/health").status_code == serve.http.get("/ready").status_code == 503
        assert serve.chat().status_code == 503
        serve.until(lambda: serve.server.should_exit)
        assert serve.service.loop.dead is not None
    assert "a sticky error" in capfd.readouterr().err


def test_serve_refuses_wrong_flags_in_one_line(capsys):
    from nanohybrid.cli.main import main

    tiny = ["serve", "--preset", "tiny", "--random-weights"]
    for flags, words in {
        ("--host", "0.0.0.0"): "can be reached by others",
        ("--max-n", "0"): "--max-n is 0",
        ("--port", "70000"): "--port is 70000",
        ("--thinking-budget", "-1"): "--thinking-budget is -1",
    }.items():
        assert main([*tiny, *flags]) == 2
        assert words in capsys.readouterr().err


def test_200_requests_on_a_queue_of_32_get_200_or_429():
    body = json.dumps({"messages": LONG["messages"], "max_tokens": 2}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    head += "content-type: application/json\r\n"
    asked = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with (
        started(Settings(max_queue=32), max_num_seqs=8, max_model_len=256) as serve,
        contextlib.ExitStack() as opened,
    ):
        serve.gate.clear()
        address = ("127.0.0.1", int(serve.url.rpartition(":")[2]))
        clients = [opened.enter_context(socket.create_connection(address, timeout=60)) for _ in range(200)]
        for client in clients:
            client.sendall(asked)
        serve.until(lambda: serve.metric('refused_total{status="429"}') == 160, 60)
        assert serve.http.get("/health").status_code == 200 and serve.service.loop.num_admitted == 40
        serve.gate.set()
        statuses = [int(client.recv(1 << 16).split()[1]) for client in clients]
        assert (statuses.count(200), statuses.count(429)) == (40, 160)
        serve.until(serve.idle)


def test_disconnect_within_a_tool_call_frees_the_slot(serve):
    pytest.importorskip("llguidance")
    parameters = {
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 500}},
        "required": ["text"],
    }
    tool = {"type": "function", "function": {"name": "write", "parameters": parameters}}
    body = {**LONG, "ignore_eos": False, "max_tokens": 400, "tools": [tool], "tool_choice": "required"}
    body["chat_template_kwargs"] = {"enable_thinking": False}
    with httpx.stream("POST", f"{serve.url}/v1/chat/completions", json=body, timeout=30) as answer:
        for line in answer.iter_lines():
            if '"tool_calls"' in line and "arguments" in line:
                break
        else:
            pytest.fail("no call was begun")
    serve.until(serve.idle, 5)
    assert not serve.service.loop.engine.scheduler.running


def test_client_that_reads_nothing_is_dropped_at_the_deadline():
    with started(limits=Limits(request_seconds=1.0), max_model_len=8192) as serve:
        body = json.dumps({**LONG, "max_tokens": 8000, "logprobs": True, "top_logprobs": 20}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", int(serve.url.rpartition(":")[2])))
            reader.sendall(head.encode() + body)
            serve.until(lambda: serve.service.loop.num_admitted == 1)
            begin = time.monotonic()
            serve.until(lambda: serve.service.loop.num_admitted == 0, 12)
            assert time.monotonic() - begin < 11
        serve.until(serve.idle)


def test_slow_headers_are_408():
    with started(limits=Limits(header_seconds=0.4)) as serve:
        # On a new connection, and on one that was used.
        for first in (b"", b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n"):
            with socket.create_connection(
                ("127.0.0.1", int(serve.url.rpartition(":")[2])), timeout=5
            ) as drip:
                if first:
                    drip.sendall(first)
                    assert b"200 OK" in drip.recv(4096)
                begin, answer = time.monotonic(), b""
                with contextlib.suppress(OSError):
                    for letter in b"GET /ready HTTP/1.1\r\nx-slow: " + b"y" * 100:
                        drip.sendall(bytes([letter]))
                        time.sleep(0.02)
                with contextlib.suppress(OSError):
                    answer = drip.recv(4096)
                assert time.monotonic() - begin < 4 and (not answer or b" 408 " in answer)
        assert serve.chat(max_tokens=60, ignore_eos=True).status_code == 200


def test_stalled_step_turns_health_to_503_and_back():
    with started(limits=Limits(step_seconds=0.3)) as serve:
        go, runner = threading.Event(), serve.service.loop.engine.runner
        run = runner.run
        runner.run = lambda work: (go.wait(20), run(work))[1]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(serve.chat, max_tokens=3)
            serve.until(lambda: httpx.get(f"{serve.url}/health").status_code == 503)
            assert httpx.get(f"{serve.url}/health").json()["error"]["code"] == "engine_stalled"
            assert httpx.post(f"{serve.url}/v1/completions", json={"prompt": "a"}).status_code == 503
            go.set()
            assert waiting.result().status_code == 200
        assert serve.http.get("/health").status_code == 200
