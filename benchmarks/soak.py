"""Minutes of mixed load on a real server: is its memory within the plan it printed, and is all given back
afterwards?

    python benchmarks/soak.py runs/quickstart/4-compress --memory-gib 2 --minutes 10
    python benchmarks/soak.py --preset tiny --random-weights --memory-gib 1.5 --minutes 2 --max-model-len 2048

Streams, clients that leave, forced tool calls, schemas, several choices, repeated beginnings, echoes, and
prompts that are refused. Flags that are not its own go to `nanohybrid serve`. Exit code 1 where anything
failed."""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

SYSTEM = "You answer in few words. " * 40
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"]}}}  # fmt: skip # noqa: E501
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}}}  # fmt: skip # noqa: E501


def request(rng: random.Random) -> tuple[str, dict, bool]:
    """(route, body, whether the client leaves in the middle)."""
    talk = [
        {
            "role": "user",
            "content": " ".join(rng.choices(["one", "two", "more", "words"], k=rng.randint(1, 60))),
        }
    ]
    body: dict = {
        "messages": talk,
        "max_tokens": rng.randint(1, 120),
        "thinking_budget": rng.choice([0, 5, 40]),
    }
    kind = rng.choice(["stream", "leave", "tool", "schema", "choices", "prefix", "echo", "too long"])
    if kind in ("stream", "leave"):
        return "/v1/chat/completions", {**body, "stream": True, "n": rng.choice([1, 1, 2])}, kind == "leave"
    if kind == "tool":
        return (
            "/v1/chat/completions",
            {**body, "tools": [TOOL], "tool_choice": "required", "stream": rng.random() < 0.5},
            False,
        )
    if kind == "schema":
        return "/v1/chat/completions", {**body, "response_format": SCHEMA}, False
    if kind == "choices":
        return (
            "/v1/chat/completions",
            {**body, "n": rng.randint(2, 4), "temperature": 1.0},
            rng.random() < 0.2,
        )
    if kind == "prefix":
        return (
            "/v1/chat/completions",
            {**body, "messages": [{"role": "system", "content": SYSTEM}, *talk]},
            False,
        )
    if kind == "echo":
        return (
            "/v1/completions",
            {"prompt": talk[0]["content"], "max_tokens": 1, "echo": True, "logprobs": 1},
            False,
        )
    return "/v1/completions", {"prompt": "x" * 200_000, "max_tokens": 1}, False


async def client(http: httpx.AsyncClient, rng: random.Random, until: float, seen: Counter) -> None:
    """One after the other, until the time is over."""
    while time.monotonic() < until:
        route, body, leaves = request(rng)
        if leaves and not body.get("stream"):
            with contextlib.suppress(httpx.TimeoutException):
                await http.post(route, json=body, timeout=0.05)
            seen["left"] += 1
            continue
        async with http.stream("POST", route, json=body) as answer:
            pieces = 0
            text = ""
            async for piece in answer.aiter_text():
                text, pieces = (text + piece)[-400:], pieces + 1
                if leaves and pieces > 3:
                    seen["left"] += 1
                    break
            else:
                broken = answer.status_code == 200 and '"error":{' in text
                seen["error in a stream" if broken else str(answer.status_code)] += 1
                if broken or answer.status_code >= 500:
                    print(answer.status_code, json.dumps(body)[:300], text[-300:], file=sys.stderr)


async def resident(pid: int, peak: list[int]) -> None:
    while True:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        peak[0] = max(
            peak[0], 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
        )
        await asyncio.sleep(0.2)


async def soak(url: str, pid: int, minutes: float, clients: int) -> dict:
    """Counts of answers, peak memory, and the server's counters after the last request."""
    seen: Counter = Counter()
    peak = [0]
    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)
    ) as http:
        watch = asyncio.create_task(resident(pid, peak))
        until = time.monotonic() + 60 * minutes
        await asyncio.gather(*(client(http, random.Random(seed), until, seen) for seed in range(clients)))
        await asyncio.sleep(2)
        watch.cancel()
        values = dict(
            line.rsplit(" ", 1)
            for line in (await http.get("/metrics")).text.splitlines()
            if not line.startswith("#")
        )
    names = [
        "requests_running",
        "requests_waiting",
        "slots_free",
        "slots_total",
        "pages_free",
        "pages_total",
        "preemptions_total",
    ]
    return {
        "seen": dict(seen),
        "peak_bytes": peak[0],
        **{name: float(values[f"nanohybrid_{name}"]) for name in names},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=24)
    arguments, flags = parser.parse_known_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nanohybrid", "serve", "--json", "--port", str(port), *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = server.stdout.read(1) if server.stdout else ""
        while server.stdout and (
            said.count("{") != said.count("}") or not said
        ):  # one object, over several lines or on one
            if not (line := server.stdout.readline()):
                return 2
            said += line
        plan = json.loads(said)["plan"]
        url = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.1)
        result = asyncio.run(soak(url, server.pid, arguments.minutes, arguments.clients))
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    finally:
        server.kill()
    result |= {"plan_bytes": plan["total_bytes"] + plan["aside_bytes"], "exit_code": code}
    held = {
        "memory within the plan": result["peak_bytes"] <= result["plan_bytes"],
        "nothing is held": not result["requests_running"] and not result["requests_waiting"]
        and result["slots_free"] == result["slots_total"] and result["pages_free"] == result["pages_total"],
        "no error": set(result["seen"]) <= {"200", "400", "429", "left"} and result["seen"].get("200", 0) > 0,
        "ends with 0": code == 0,
    }  # fmt: skip
    print(json.dumps(result | held, indent=2))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
