"""`nanohybrid chat`: a conversation in the terminal, or one that is read from a pipe line by line."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser, print_json
from nanohybrid.cli.model_flags import (
    Clock,
    add_model_flags,
    add_sampling_flags,
    open_model,
    sampling_params,
    tell_of_template,
)
from nanohybrid.errors import InputError

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.cli.conversation import AnswerDelta, Conversation

SUMMARY = "talk with a model in the terminal"
HELP = """  /think, /no_think   turn thinking on or off
  /budget N           end thinking at the next newline after N tokens; /budget off: no limit
  /clear              start a new conversation
  /help               show this
  /quit, Ctrl-D       leave
  Ctrl-C              stop the answer"""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}  # a model must not control the terminal


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("chat", SUMMARY)
    add_model_flags(result, batched=False)
    result.add_argument("--system", metavar="TEXT", help="a system message")
    result.add_argument("--no-think", action="store_true", help="begin with thinking off")
    result.add_argument(
        "--max-model-len",
        type=int,
        default=8192,
        metavar="N",
        help="tokens of conversation and answer together",
    )
    result.renamed({"--context": "--max-model-len"})
    add_sampling_flags(result, max_new_tokens=4096, temperature=None, top_p=None)
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Read and answer messages until the input ends. With --json each answer is a JSON object on a line."""
    free = frozenset(name for name in ("temperature", "top_p") if arguments[name] is None)
    arguments.temperature = 0.0 if arguments.temperature is None else arguments.temperature
    arguments.top_p = 1.0 if arguments.top_p is None else arguments.top_p
    params = sampling_params(arguments)
    if arguments.max_model_len < 1:
        raise InputError(f"--max-model-len is {arguments.max_model_len}; it must be at least 1")
    called = arguments.path or arguments.preset
    llm = open_model(arguments)
    llm.template.check_vocabulary(llm.tokenizer)
    tell_of_template(llm)

    from nanohybrid.cli.conversation import Conversation
    from nanohybrid.engine import Engine

    longest = min(arguments.max_model_len, llm.model.config.max_position_embeddings)
    config = replace(llm.engine_config, max_model_len=longest)
    engine = Engine(llm.model, llm.tokenizer, config)
    thinking = False if arguments.no_think else None
    talk = Conversation(llm, engine, params, free, thinking, arguments.system)
    live = sys.stdin.isatty()
    if live and not arguments.json:
        print(f"{called}: /help lists the commands, Ctrl-D leaves", file=sys.stderr)
    with _history(live):
        for line in _lines(live):
            if line.startswith("/") and (act := command(talk, line)) is not None:
                if act == "quit":
                    break
                print(act, file=sys.stderr)
            else:
                _answer(talk, line, arguments.json)
    return 0


def command(talk: "Conversation", line: str) -> str | None:
    """Execute a line that is a command; returns what to print. None where the line is a message."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name in ("/think", "/no_think"):
        if value:
            return None  # `/no_think how are you?` is a message, whose switch the template reads
        talk.thinking = name == "/think"
        return f"thinking is {'on' if talk.thinking else 'off'}"
    if name == "/budget":
        return _budget(talk, value)
    if name == "/clear":
        talk.clear()
        return "new conversation"
    if name == "/help":
        return HELP
    return "quit" if name in ("/quit", "/exit") else f"there is no command {name}; /help lists them"


def _budget(talk: "Conversation", value: str) -> str:
    if value not in ("off", "none") and not (value.isascii() and value.isdigit() and len(value) < 10):
        return "give a number of tokens, or off: /budget 200"
    talk.params = replace(talk.params, thinking_budget=int(value) if value.isdigit() else None)
    return f"thinking ends after {value} tokens" if value.isdigit() else "thinking has no budget"


def _answer(talk: "Conversation", text: str, as_json: bool) -> None:
    """Print one answer. Ctrl-C stops it. A message that cannot be answered is one line on stderr."""
    from nanohybrid.cli.completion import as_json as described

    clock, show = Clock(), _Writer(sys.stdout.isatty())
    try:
        with _interrupting(lambda: setattr(talk, "stop", True)):
            for delta in talk.ask(text):
                if not as_json:
                    show.delta(delta)
    except InputError as error:
        print(f"nanohybrid: {error}", file=sys.stderr)
        return
    finally:
        if not as_json:
            show.end()
    done = talk.completion
    if as_json:
        stopped = {"text": None, "finish_reason": "stopped"}
        print_json({**(stopped if done is None else described(done)), "seconds": clock.seconds})
        sys.stdout.flush()
    elif done is None:
        print(show.dimmed("[stopped]"), file=sys.stderr)
    else:
        thought = ""
        if done.thinking_tokens:
            thought = f", {done.thinking_tokens} of them thinking ({done.thinking_end} end)"
        cut = ", cut at the limit" if done.finish_reason == "length" else ""
        count = len(done.token_ids)
        print(
            show.dimmed(f"[{count} tokens{thought}{cut}, {count / clock.seconds:.1f} tokens/s]"),
            file=sys.stderr,
        )


class _Writer:
    """Writes deltas to stdout: the thinking trace dimmed on a terminal, between its tags elsewhere."""

    def __init__(self, terminal: bool) -> None:
        self.terminal = terminal
        self.color = terminal and "NO_COLOR" not in os.environ
        self._thinking = False
        self._line_ended = True

    def delta(self, delta: "AnswerDelta") -> None:
        if delta.thinking != self._thinking:
            self._switch(delta.thinking)
        self._write(delta.text.translate(CONTROLS) if self.terminal else delta.text)

    def end(self) -> None:
        if self._thinking and self.color:
            self._write(PLAIN)
        self._thinking = False
        print(flush=True)

    def dimmed(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self.color else text

    def _switch(self, thinking: bool) -> None:
        self._thinking = thinking
        if thinking:
            self._write(DIM if self.color else "<think>\n")
        else:
            self._write(("" if self._line_ended else "\n") + (f"{PLAIN}\n" if self.color else "</think>\n\n"))

    def _write(self, text: str) -> None:
        self._line_ended = text.endswith("\n")
        print(text, end="", flush=True)


@contextmanager
def _interrupting(act: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C inside calls `act` instead of raising, so that no step is interrupted; a second one raises."""

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        act()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(live: bool) -> Iterator[str]:
    """Yield the lines of the input that are not empty. Ctrl-C at the prompt discards the line."""
    while True:
        try:
            line = input("> " if live else "")
        except EOFError:
            if live:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if line.strip():
            yield line.strip()


@contextmanager
def _history(live: bool) -> Iterator[None]:
    """Line editing with a history file.

    The history is in memory only where the file cannot be used, and missing where there is no readline.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    path = (
        Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "nanohybrid" / "history"
    )
    on_disk = live and _usable(path)
    if on_disk:
        readline.read_history_file(path)
    try:
        yield
    finally:
        if on_disk:
            readline.set_history_length(1000)
            readline.write_history_file(path)


def _usable(path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
        return os.access(path, os.R_OK | os.W_OK)
    except OSError:
        return False
