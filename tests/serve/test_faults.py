import base64
import concurrent.futures
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from serving import httpx, sse, started

from nanohybrid.cli.serve import read_keys
from nanohybrid.errors import InputError
from nanohybrid.serve.limits import Limits
from nanohybrid.serve.service import Settings

LONG = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 900, "ignore_eos": True, "stream": True}


def leave_after(serve, lines, body=LONG):
    """Be a client that goes away in mid-stream."""
    with httpx.stream("POST", f"{serve.url}/v1/chat/completions", json=body, timeout=30) as answer:
        for count, _ in enumerate(answer.iter_lines()):
            if count >= lines:
                return answer.status_code


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_gone_in_mid_stream_frees_what_it_held_within_a_step(serve, n):
    assert leave_after(serve, 6 * n, {**LONG, "n": n}) == 200
    serve.until(serve.idle, 5)


def test_a_client_gone_before_the_first_token_is_never_run(serve):
    serve.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{serve.url}/v1/chat/completions", json={**LONG, "stream": False}, timeout=0.3)
    serve.until(lambda: serve.service.loop.held == 0)
    steps = []
    step = serve.service.loop.engine.step
    serve.service.loop.engine.step = lambda: steps.append(1) or step()
    serve.gate.set()
    serve.until(serve.idle, 5)
    serve.service.loop.engine.step = step
    assert len(steps) <= 1


def test_a_client_gone_while_queued_leaves_the_queue(serve):
    serve.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        first = [pool.submit(leave_after, serve, 4) for _ in range(6)]  # four run, two wait
        serve.until(lambda: serve.service.loop.held == 6)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{serve.url}/v1/chat/completions", json={**LONG, "stream": False}, timeout=0.3)
        serve.until(lambda: serve.service.loop.held == 6)
        serve.gate.set()
        assert [one.result() for one in first] == [200] * 6
    serve.until(serve.idle, 5)


def test_a_full_queue_says_when_to_come_again(serve):
    serve.gate.clear()
    short = {**LONG, "stream": False, "max_tokens": 3}
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(httpx.post, f"{serve.url}/v1/chat/completions", json=short, timeout=30) for _ in range(20)]
        serve.until(lambda: sum(one.done() for one in asked) == 8)  # 4 running and 8 queued have places
        serve.gate.set()
        answers = [one.result() for one in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert sorted(answer.status_code for answer in answers) == [200] * 12 + [429] * 8
    assert all(int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)
    serve.until(serve.idle)


def test_a_slow_reader_delays_nobody(serve):
    with httpx.stream("POST", f"{serve.url}/v1/chat/completions", json=LONG, timeout=30):
        begin = time.monotonic()
        assert serve.chat(max_tokens=5).status_code == 200
        assert time.monotonic() - begin < 5
    serve.until(serve.idle)


def test_deadlines_end_what_takes_too_long():
    limits = Limits(queue_seconds=0.2, request_seconds=1.0)
    with started(Settings(name="tiny", max_context=4096, max_queued=8), limits, max_running=1) as serve:
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


def test_numbers_that_broke_fail_their_own_request_only(serve):
    engine = serve.service.loop.engine
    step = engine.step

    def broken():
        advanced = step()
        for request in advanced:
            if request.params.seed == 666 and not request.finished:
                engine.scheduler.remove(request)
                request.finish_reason = "error"
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


def test_a_dead_engine_fails_its_requests_and_health_and_ends_the_server(capfd):
    with started() as serve:
        serve.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            whole, stream = pool.submit(serve.chat, max_tokens=50), pool.submit(serve.chat, max_tokens=50, stream=True)
            serve.until(lambda: serve.service.loop.held == 2)

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


@pytest.fixture(scope="module")
def locked():
    with started(Settings(name="tiny", max_context=256, keys=("correct-horse", "battery-staple"))) as running:
        yield running


def test_every_route_but_health_and_ready_wants_a_key(locked):
    routes = [(method, route.path) for route in locked.server.config.app.routes for method in route.methods or ()]
    routes += [("GET", "/nothing"), ("POST", "//v1/models"), ("GET", "/health/"), ("GET", "/Health"), ("GET", "/health/../v1/models")]
    statuses = {(method, path): locked.http.request(method, path).status_code for method, path in routes}
    assert len(routes) > 12 and {("GET", "/"), ("GET", "/openapi.json"), ("GET", "/metrics")} <= statuses.keys()
    for (_, path), status in statuses.items():
        assert (status == 401) == (path not in ("/health", "/ready")), (path, status)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer correct-horse", 200), ("bearer battery-staple", 200), ("Bearer correct-horsf", 401), ("Bearer", 401),
        ("correct-horse", 401), ("Bearer correct-horse x", 401), ("Basic " + base64.b64encode(b"me:correct-horse").decode(), 200),
        ("Basic " + base64.b64encode(b"correct-horse:").decode(), 401), ("Basic !", 401), ("", 401),
    ],
)  # fmt: skip
def test_only_a_right_key_is_let_in(locked, header, status):
    assert locked.http.get("/v1/models", headers={"authorization": header}).status_code == status


def test_a_browser_is_asked_for_the_key(locked):
    assert locked.http.get("/").headers["www-authenticate"].startswith("Basic")


def test_keys_are_read_from_file_and_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n two \n")
    monkeypatch.setenv("NANOHYBRID_API_KEY", "three")
    assert read_keys(path) == ("three", "one", "two") and read_keys(None) == ("three",)
    path.write_text("\n")
    monkeypatch.delenv("NANOHYBRID_API_KEY")
    with pytest.raises(InputError, match="holds no key"):
        read_keys(path)
    with pytest.raises(InputError, match="No such file"):
        read_keys(tmp_path / "nowhere")


def test_what_cannot_be_served_is_one_line(capsys):
    from nanohybrid.cli.main import main

    tiny = ["serve", "--preset", "tiny", "--random-weights"]
    for flags, words in {
        ("--host", "0.0.0.0"): "is reached by others",
        ("--max-n", "0"): "--max-n is 0",
        ("--port", "70000"): "--port is 70000",
        ("--thinking-budget", "-1"): "--thinking-budget is -1",
    }.items():
        assert main([*tiny, *flags]) == 2
        assert words in capsys.readouterr().err


def test_sigterm_ends_the_stream_whole_and_the_exit_code_is_0():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "nanohybrid",
        "serve",
        "--preset",
        "tiny",
        "--random-weights",
        "--port",
        str(port),
        "--max-running",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
        done = {}

        def ask():
            done["answer"] = httpx.post(f"{url}/v1/chat/completions", json={**LONG, "max_tokens": 400}, timeout=60)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        chunks = sse(done["answer"])
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == 0, process.stderr.read()
    finally:
        process.kill()
        process.communicate()
