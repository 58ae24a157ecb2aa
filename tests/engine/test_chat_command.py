import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from nanohybrid.cli.chat import command
from nanohybrid.cli.conversation import Conversation
from nanohybrid.cli.main import main
from nanohybrid.engine.engine import Engine
from nanohybrid.engine.llm import LLM
from nanohybrid.engine.params import SamplingParams
from nanohybrid.errors import InputError

TINY = ["--preset", "tiny", "--random-weights", "--seed", "3"]


@pytest.fixture
def chat(capsys, monkeypatch):
    """Run `nanohybrid chat` in this process with these lines as its standard input."""

    def inner(lines, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = main(["chat", *TINY, "--max-new-tokens", "20", *flags])
        out = capsys.readouterr()
        return code, out.out, out.err

    return inner


@pytest.fixture
def talk(model, tokenizer):
    llm = LLM.from_model(model, tokenizer)
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=400)
    return Conversation(
        llm,
        engine,
        SamplingParams(max_tokens=20, ignore_eos=True, thinking_grace=2),
        frozenset({"temperature", "top_p"}),
    )


def test_chat_answers_every_line_of_a_pipe(chat):
    code, out, err = chat("hello\n\n/no_think\n/budget 5\nagain\n/clear\n/nonsense\n")
    assert code == 0 and out.startswith("<think>\n")
    for expected in (
        "thinking is off",
        "thinking ends after 5 tokens",
        "new conversation",
        "no command /nonsense",
        "tokens/s",
    ):
        assert expected in err


def test_chat_quit_ends_without_an_answer(chat):
    assert chat("/quit\nhello\n")[1] == ""


def test_chat_json_prints_one_object_a_line(chat):
    _, out, _ = chat(
        "hello\nagain\n", "--json", "--thinking-budget", "3", "--thinking-grace", "0", "--ignore-eos"
    )
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 2 and all(a["thinking_tokens"] <= 3 for a in answers)


def test_chat_commands_apply_to_the_next_answer(talk):
    assert command(talk, "/no_think") == "thinking is off" and not any(
        piece.thinking for piece in talk.ask("x")
    )
    assert command(talk, "/think") == "thinking is on" and all(piece.thinking for piece in talk.ask("x"))
    assert "4 tokens" in command(talk, "/budget 4")
    list(talk.ask("x"))
    assert talk.completion.thinking_end in ("forced", "newline") and talk.completion.thinking_tokens <= 6
    assert command(talk, "/budget off") == "thinking has no budget" and talk.params.thinking_budget is None
    assert "give a number" in command(talk, "/budget -3") and "give a number" in command(talk, "/budget ²")
    assert command(talk, "/no_think how are you?") is None
    assert talk.turns and command(talk, "/clear") == "new conversation" and not talk.turns


def test_chat_samples_thinking_answers_by_the_model_card_and_others_greedily(talk):
    thinks, plain = talk._params(True, 10), talk._params(False, 10)
    assert (thinks.temperature, thinks.top_p, plain.temperature, plain.top_p) == (0.6, 0.95, 0.0, 1.0)


def test_chat_ctrl_c_stops_the_answer_only(chat, monkeypatch):
    step, count = Engine.step, iter(range(100))

    def interrupted(self):
        if next(count) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    code, _, err = chat("hello\nagain\n", "--ignore-eos")
    assert code == 0 and err.count("[stopped]") == 1 and err.count("tokens/s") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_chat_stopped_answer_frees_its_slot_and_stays_in_the_conversation(talk):
    talk.thinking = False
    for count, _ in enumerate(talk.ask("x")):
        talk.stop = count == 3
    assert talk.completion is None and not talk.engine.busy and talk.engine.scheduler.slots.num_used == 0
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"]


def test_chat_full_context_is_an_error_that_names_clear(talk):
    with pytest.raises(InputError, match="/clear starts a new one"):
        list(talk.ask("x" * 500))
    assert not talk.turns


@pytest.mark.slow
def test_chat_on_a_terminal_dims_the_trace_and_handles_ctrl_c_and_ctrl_d(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nanohybrid", "chat", *TINY, "--ignore-eos", "--max-new-tokens", "3000"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = ""

    def until(text, seconds=120):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end, f"{text!r} did not come; seen {seen[-500:]!r}"
            seen += os.read(ours, 65536).decode("utf-8", "replace")

    until("> ")
    os.write(ours, b"hello\n")
    until("\x1b[2m")
    process.send_signal(signal.SIGINT)
    until("[stopped]")
    seen = ""
    os.write(ours, b"/help\n")
    until("stop the answer\r\n> ")
    os.write(ours, b"\x04")
    assert process.wait(30) == 0
    assert "hello" in (tmp_path / "nanohybrid" / "history").read_text()
    os.close(ours)


def test_chat_says_that_a_checkpoint_has_no_chat_template(tmp_path, capsys, monkeypatch):
    assert main(["init", *TINY[:2], "--out", str(tmp_path / "m")]) == 0
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink(missing_ok=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["chat", str(tmp_path / "m"), "--max-new-tokens", "2"]) == 0
    warning = f"warning: {tmp_path / 'm'}: has no chat template; conversations use the built-in one"
    assert warning in capsys.readouterr().err
