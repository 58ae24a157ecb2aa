"""A server as a process: how it ends."""

import concurrent.futures
import json
import signal
import socket
import subprocess
import sys
import time

import pytest
from serving import httpx, sse

LONG = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
}
DIES = """
import nanohybrid.engine.engine as engine, nanohybrid.cli.main as main, sys
step, count = engine.Engine.step, []
def dying(self):
    count.append(1)
    if len(count) > 20:
        raise RuntimeError("a sticky error")
    return step(self)
engine.Engine.step = dying
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def processes():
    """Three servers that are ready, as (process, url), by how they will end.

    They start together, to save time.
    """
    servers = {}
    try:
        for name, program in {
            "term": ("-m", "nanohybrid"),
            "kill": ("-m", "nanohybrid"),
            "death": ("-c", DIES),
        }.items():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            command = [
                sys.executable,
                *program,
                "serve",
                "--preset",
                "tiny",
                "--random-weights",
                "--max-num-seqs",
                "2",
                "--port",
                port,
            ]
            servers[name] = (
                subprocess.Popen(command, stderr=subprocess.PIPE, text=True),
                f"http://127.0.0.1:{port}",
            )
        for server, url in servers.values():
            until_ready(server, url)
        yield servers
    finally:
        for server, _ in servers.values():
            server.kill()
            server.communicate()


def until_ready(server, url):
    for _ in range(600):
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.HTTPError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.1)


def stream(url, begun, body=LONG):
    """The text of a stream, and the error that ended it; `begun` gets an entry for each piece."""
    text = ""
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            for piece in answer.iter_text():
                text += piece
                begun.append(1)
    except httpx.HTTPError as error:
        return text, type(error).__name__
    return text, None


def begin(pool, url):
    begun = []
    future = pool.submit(stream, url, begun)
    while not begun and not future.done():
        time.sleep(0.01)
    return future


def test_sigterm_completes_the_stream_and_exits_with_0(processes):
    server, url = processes["term"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        going = begin(pool, url)
        server.send_signal(signal.SIGTERM)
        text, error = going.result(60)
        assert error is None and sse_of(text)[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait(20) == 0, server.stderr.read()


def test_sigkill_breaks_the_stream_visibly(processes):
    server, url = processes["kill"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        going = begin(pool, url)
        server.kill()
        text, error = going.result(20)
        assert error is not None and "[DONE]" not in text and server.wait(10) == -signal.SIGKILL


def test_dead_engine_exits_with_1_and_ends_streams_with_an_error(processes):
    server, url = processes["death"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        text, error = begin(pool, url).result(20)
        assert error is None and json.loads(text.split("data: ")[-1])["error"]["code"] == "engine_dead"
        assert server.wait(20) == 1
        assert "a sticky error" in server.stderr.read()


def sse_of(text):
    class OutputParser:
        pass

    OutputParser.text = text
    return sse(OutputParser)
