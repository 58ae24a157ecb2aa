"""`nanohybrid generate --input --output`: a file of prompts to a file of answers, in the same order.

An interrupted run resumes where the output ends, after a check that what is there answers these prompts and
was made with the same model and settings, which stand in `OUTPUT.settings.json`.
"""

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from nanohybrid import strict_json
from nanohybrid.cli.common import print_json
from nanohybrid.cli.completion import as_json, chat_wanted, thinking_wanted
from nanohybrid.cli.model_flags import Clock, open_model
from nanohybrid.errors import InputError
from nanohybrid.files import atomic_write
from nanohybrid.stages.fingerprint import fingerprint
from nanohybrid.stages.lineage import peak_memory_bytes
from nanohybrid.stages.plain import jsonable
from nanohybrid.stages.progress import progress
from nanohybrid.text.messages import checked

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.engine import LLM, SamplingParams
    from nanohybrid.engine.request import Request

Line = dict[str, Any]
ASKED_FIELDS = ("prompt", "messages", "seed")  # an answer repeats them


class Asked(NamedTuple):
    """A line of the input, and its name in errors: FILE:NUMBER."""

    where: str
    line: Line


def generate_file(arguments: "jsonargparse.Namespace", params: "SamplingParams") -> None:
    """Answer every line of --input that --output does not answer yet.

    Raises InputError where either file cannot be used.
    """
    lines = read_lines(arguments.input)
    if arguments.output.exists() and arguments.output.samefile(arguments.input):
        raise InputError(f"{arguments.output} is the input file: give another --output")
    done = answered(arguments.output, lines, arguments.input)
    settings = _settings(arguments, params)
    if done:
        check_settings(arguments.output, settings)
    tokens, clock = 0, Clock()
    if done < len(lines):
        llm = open_model(arguments)
        clock = Clock()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with (
            _alone(arguments.output) as file,
            progress("generate", len(lines), unit="prompts", done=done) as bar,
        ):
            if not done and arguments.output.is_file():  # not for a pipe, which cannot be resumed
                atomic_write(_settings_file(arguments.output), json.dumps(settings, indent=1) + "\n")
            tokens = _answer(llm, lines[done:], params, arguments, file, bar.advance)
    figures = {"prompts": len(lines), "answered_before": done, "tokens": tokens, "seconds": clock.seconds}
    figures |= {
        "tokens_per_second": tokens / clock.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "output": arguments.output,
    }
    if arguments.json:
        print_json(figures)
    else:
        print(
            f"{len(lines) - done} answers ({done} were there), {tokens} tokens, "
            f"{tokens / clock.seconds:.0f} tokens/s: {arguments.output}"
        )


def read_lines(path: Path) -> list[Asked]:
    """The prompts of a file. Raises InputError, with file and line, where a line is not a prompt."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    lines: list[Asked] = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if raw.strip():
            lines.append(Asked(f"{path}:{number}", _parse(raw, f"{path}:{number}")))
    if not lines:
        raise InputError(f'{path}: has no prompts; a line is {{"prompt": "..."}} or {{"messages": [...]}}')
    return lines


def answered(output: Path, lines: list[Asked], source: Path) -> int:
    """How many lines `output` answers already. A last line that is incomplete is removed from the file.

    Raises InputError where the file has anything but answers to these prompts.
    """
    if not output.is_file():  # it does not exist, or is a pipe or device, which must not be read
        return 0
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    found = [line for line in whole.split(b"\n") if line]
    for number, (raw, asked) in enumerate(zip(found, [*lines, *[None] * len(found)], strict=False), start=1):
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = None
        if (
            asked is None
            or not isinstance(answer, dict)
            or any(answer.get(key) != asked.line.get(key) for key in ASKED_FIELDS)
        ):
            raise InputError(
                f"{output}:{number}: does not answer a prompt of {source}; "
                "give another --output, or remove the file"
            )
    if len(whole) < len(content):
        if len(found) == len(lines) or not _begins(content[len(whole) :], lines[len(found)].line):
            raise InputError(
                f"{output}:{len(found) + 1}: is not the beginning of an answer; "
                "give another --output, or remove the file"
            )
        with open(output, "r+b") as file:
            file.truncate(len(whole))
    return len(found)


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Raise InputError, naming what differs, where the answers of `output` were made with other settings."""
    file = _settings_file(output)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    otherwise = "give another --output, or remove the file"
    if not isinstance(stored, dict):
        raise InputError(
            f"{output}: {file.name}, which says how its answers were made, is missing; {otherwise}"
        )
    for name in sorted(stored.keys() | settings.keys()):
        before, now = stored.get(name), settings.get(name)
        if before != now:
            values = "" if name == "model" else f" ({json.dumps(before)}, now {json.dumps(now)})"
            raise InputError(f"{output}: its answers were made with another {name}{values}; {otherwise}")


def _settings_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.settings.json")


def _settings(arguments: "jsonargparse.Namespace", params: "SamplingParams") -> dict[str, Any]:
    """What decides the answers beside the prompts. The model is a hash of its files."""
    names = ("dtype", "quantize", "mamba_ssm_cache_dtype", "kv_cache_dtype", "num_speculative_tokens")
    model = arguments.preset
    if arguments.path is not None:
        from nanohybrid.checkpoint import resolve

        model = fingerprint(resolve(arguments.path))
    found = {
        "model": model,
        "thinking": thinking_wanted(arguments),
        "chat": chat_wanted(arguments),
        **{name: arguments[name] for name in names},
        **asdict(params),
    }
    return dict(json.loads(json.dumps(found, default=jsonable)))


def _begins(cut: bytes, line: Line) -> bool:
    """Whether `cut` is the beginning of an answer to `line`: no other file may be shortened."""
    first = json.dumps(dict([next(iter(line.items()))]), ensure_ascii=False)[:-1].encode()
    return cut[: len(first)] == first[: len(cut)]


@contextmanager
def _alone(output: Path) -> Iterator[IO[str]]:
    """The output, open for appending and locked against a second process.

    Raises InputError where another process has it.
    """
    with open(output, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{output}: another process writes it: wait for it, or give another --output"
            ) from None
        yield file


def _answer(
    llm: "LLM",
    asked: list[Asked],
    params: "SamplingParams",
    arguments: "jsonargparse.Namespace",
    file: IO[str],
    advance: Callable[[int], object],
) -> int:
    """Answer all lines with one engine; each answer is written once all before it are. Returns the tokens."""
    thinking = thinking_wanted(arguments)
    prompts = []
    for one in asked:
        with _named(one.where):
            prompts.append(_encode(llm, one.line, chat_wanted(arguments), thinking))
    engine = llm.engine(prompts, params.max_tokens)
    requests = []
    for one, prompt in zip(asked, prompts, strict=True):
        seed = params.seed if one.line.get("seed") is None else one.line["seed"]
        chat = "messages" in one.line or chat_wanted(arguments)
        own = replace(params, seed=seed, may_think=chat and llm.may_think(prompt))
        with _named(one.where):
            requests.append(engine.add(prompt, own))
    written = tokens = 0
    while written < len(requests):
        engine.step()
        for line, request in _ready(asked, requests, written):
            completion = request.completion()
            file.write(
                json.dumps({**line, **as_json(completion)}, default=jsonable, ensure_ascii=False) + "\n"
            )
            file.flush()
            written, tokens = written + 1, tokens + len(completion.token_ids)
            advance(1)
    return tokens


def _ready(asked: list[Asked], requests: list["Request"], written: int) -> Iterator[tuple[Line, "Request"]]:
    for one, request in zip(asked[written:], requests[written:], strict=True):
        if not request.finished:
            return
        yield one.line, request


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Prefix an InputError that is raised inside with the name of the line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _encode(llm: "LLM", line: Line, chat: bool, thinking: bool | None) -> list[int]:
    if "messages" in line:
        return llm.encode_chat(line["messages"], thinking)
    if chat:
        return llm.encode_chat([{"role": "user", "content": line["prompt"]}], thinking)
    return llm.encode(line["prompt"])


def _parse(raw: bytes, where: str) -> Line:
    try:
        line = strict_json.loads(raw.decode("utf-8"))
    except strict_json.SurrogateError as error:
        raise InputError(f"{where}: has {error}; remove it") from None
    except UnicodeDecodeError:
        raise InputError(f"{where}: is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise InputError(f'{where}: must be an object with either "prompt" or "messages"')
    if "prompt" in line and not isinstance(line["prompt"], str):
        raise InputError(f'{where}: "prompt" must be a string')
    if "messages" in line:
        with _named(where):
            checked(line["messages"])
    if line.get("seed") is not None and type(line["seed"]) is not int:
        raise InputError(f'{where}: "seed" must be a whole number')
    return line
