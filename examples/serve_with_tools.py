"""Serve a model and let it call a tool, through the OpenAI client.

    python examples/serve_with_tools.py runs/quickstart/4-compress
    python examples/serve_with_tools.py   # random weights; the call is well-formed all the same

`tool_choice="required"` constrains the output to a call that fits the tool's JSON schema, whatever the model
would say."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from openai import OpenAI

MODEL = sys.argv[1:] or ["--preset", "tiny", "--random-weights"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two whole numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "minimum": 0, "maximum": 99},
                    "b": {"type": "integer", "minimum": 0, "maximum": 99},
                },
                "required": ["a", "b"],
            },
        },
    }
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(url: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    raise SystemExit(f"the server ended with {server.returncode}")


def main() -> None:
    port = free_port()
    command = [sys.executable, "-m", "nanohybrid", "serve", *MODEL, "--port", str(port)]
    with subprocess.Popen(command) as server:
        try:
            wait_until_ready(url := f"http://127.0.0.1:{port}", server)
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            model = client.models.list().data[0].id
            messages = [{"role": "user", "content": "What is 17 + 25?"}]
            options = {"model": model, "tools": TOOLS, "max_tokens": 96, "seed": 1}
            options["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
            answer = client.chat.completions.create(messages=messages, tool_choice="required", **options)
            call = answer.choices[0].message.tool_calls[0]
            given = json.loads(call.function.arguments)
            print(f"the model calls {call.function.name}({given['a']}, {given['b']})")
            messages += [answer.choices[0].message.model_dump(exclude_none=True)]
            messages += [{"role": "tool", "tool_call_id": call.id, "content": str(given["a"] + given["b"])}]
            answer = client.chat.completions.create(messages=messages, tool_choice="none", **options)
            print("and answers:", answer.choices[0].message.content[:200])
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
