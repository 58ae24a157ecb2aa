"""A real server on loopback, over a tiny random model, in a thread of the test's process."""

import contextlib
import socket
import threading
import time

import pytest
import torch

from nanohybrid.config import HybridConfig
from nanohybrid.engine import LLM
from nanohybrid.serve.limits import Limits
from nanohybrid.serve.server import make_server
from nanohybrid.serve.service import Service, Settings

httpx = pytest.importorskip("httpx")
CONFIG = HybridConfig(
    pattern="M-*M-",
    vocab_size=269,
    hidden_size=48,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    mamba_num_heads=4,
    mamba_head_dim=20,
    n_groups=2,
    ssm_state_size=16,
    initializer_range=0.3,
)


class Running:
    """A running server: its address, its service, and a gate that stops the engine between two steps."""

    def __init__(self, service, server, url):
        self.service, self.server, self.url = service, server, url
        self.http = httpx.Client(base_url=url, timeout=30)
        self.gate = threading.Event()
        self.gate.set()
        step = service.loop.engine.step

        def gated():
            self.gate.wait(20)
            return step()

        service.loop.engine.step = gated

    def chat(self, text="hi", **more):
        return self.http.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], **more}
        )

    def metric(self, name):
        lines = self.http.get("/metrics").text.splitlines()
        return next(
            (float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"nanohybrid_{name}")), 0.0
        )

    def until(self, holds, seconds=10):
        """Wait until a condition holds that another thread establishes."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.01)

    def idle(self):
        """Whether no request runs or waits, and no slot, page or permit is left."""
        scheduler, loop = self.service.loop.engine.scheduler, self.service.loop
        return not (
            scheduler.running
            or scheduler.waiting
            or scheduler.slots.num_used
            or scheduler.pages.num_used
            or loop.num_admitted
        )


@contextlib.contextmanager
def started(settings=None, limits=None, before=lambda service: None, llm=None, **options):
    """Start a server, of a random model where `llm` is None; `options` are those of its engine."""
    options = {"max_num_seqs": 4, "max_model_len": 1024, **options}
    llm = llm or LLM.random(CONFIG, torch.float32, seed=5, **options)
    service = Service(llm, settings or Settings(model_name="tiny", max_queue=8), limits or Limits())
    before(service)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = make_server(service, "127.0.0.1", 0, 10)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    running = Running(service, server, f"http://127.0.0.1:{listening.getsockname()[1]}")
    thread.start()
    try:
        running.until(lambda: server.started)
        yield running
    finally:
        running.gate.set()
        server.should_exit = True
        running.http.close()
        thread.join(20)
        assert not thread.is_alive()


def sse(response):
    """The JSON objects of a stream of server-sent events."""
    import json

    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def force_answer(serve, monkeypatch, text):
    """Let the model write this text and then end, in every answer from now on."""
    tokenizer, engine = serve.service.llm.tokenizer, serve.service.loop.engine
    add = engine.add_choices

    def forced(prompt, params, **more):
        requests = add(prompt, params, **more)
        for request in requests:
            request.forced.extend([*tokenizer.encode(text), tokenizer.eos_id])
        return requests

    monkeypatch.setattr(engine, "add_choices", forced)
