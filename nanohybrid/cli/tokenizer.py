"""`nanohybrid tokenizer`: train or convert a tokenizer, encode and decode."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanohybrid.cli.common import MODEL
from nanohybrid.cli.parser import CommandParser
from nanohybrid.errors import InputError

SUMMARY = "train or convert a tokenizer"
CHUNK_CHARACTERS = 1 << 20


def parser() -> CommandParser:
    """The parser of the four subcommands."""
    top = CommandParser(prog="nanohybrid tokenizer", description=SUMMARY, exit_on_error=False)
    actions = top.add_subcommands(dest="action")
    actions.add_subcommand("train", _train_parser(), help="train a small byte-level BPE on text files")
    actions.add_subcommand(
        "tekken", _tekken_parser(), help="write the tokenizer of the official checkpoints, with 131,072 ids"
    )
    actions.add_subcommand("encode", _encode_parser(), help="ids of a text")
    actions.add_subcommand("decode", _decode_parser(), help="text of ids")
    return top


def run(arguments: Any) -> int | None:
    """Run the chosen subcommand; results go to stdout, notes to stderr."""
    actions = {"train": _train, "tekken": _tekken, "encode": _encode, "decode": _decode}
    actions[arguments.action](arguments[arguments.action])
    return 0


def _train_parser() -> CommandParser:
    one = CommandParser(
        description="Ids 0 to 12 are special tokens, 13 to 268 the bytes, then the learned merges.",
        exit_on_error=False,
    )
    one.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text files")
    one.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of ids, at least 269")
    return _with_out(one)


def _tekken_parser() -> CommandParser:
    one = CommandParser(
        description="Reads tekken_240718.json from the package mistral-common.", exit_on_error=False
    )
    one.add_argument(
        "--path",
        type=Path | None,
        default=None,
        metavar="FILE",
        help="the file, if mistral-common is not installed",
    )
    return _with_out(one)


def _encode_parser() -> CommandParser:
    one = CommandParser(exit_on_error=False)
    one.add_argument("path", type=Path, help=f"{MODEL}, or a tokenizer.json")
    one.add_argument(
        "--text", type=str, required=True, metavar="TEXT", help="the text; - reads standard input"
    )
    one.add_argument("--bos", action="store_true", help="start with <s>")
    one.add_argument("--plain", action="store_true", help="encode special tokens in the text as plain text")
    return _with_json(one)


def _decode_parser() -> CommandParser:
    one = CommandParser(exit_on_error=False)
    one.add_argument("path", type=Path, help=f"{MODEL}, or a tokenizer.json")
    one.add_argument(
        "--ids", type=int, nargs="+", required=True, metavar="ID", help="the ids, separated by spaces"
    )
    one.add_argument("--plain", action="store_true", help="skip special tokens")
    return _with_json(one)


def _with_out(one: CommandParser) -> CommandParser:
    one.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory for tokenizer.json and chat_template.jinja",
    )
    return _with_json(one)


def _with_json(one: CommandParser) -> CommandParser:
    one.add_argument("--json", action="store_true", help="print a JSON object")
    return one


def _train(arguments: Any) -> None:
    from nanohybrid.text import train_bpe

    started = time.monotonic()
    _save(train_bpe(_texts(arguments.input), arguments.vocab_size), arguments, started)


def _tekken(arguments: Any) -> None:
    from nanohybrid.text import tekken

    started = time.monotonic()
    _save(tekken(arguments.path), arguments, started)


def _save(tokenizer: Any, arguments: Any, started: float) -> None:
    from nanohybrid.text import ChatTemplate

    tokenizer.save(arguments.out)
    ChatTemplate.default().save(arguments.out)
    asked = arguments.get("vocab_size")
    if asked is not None and tokenizer.vocab_size < asked:
        print(
            f"only {tokenizer.vocab_size} of {asked} ids: no other pair of tokens occurs twice in these "
            "files",
            file=sys.stderr,
        )
    result = {
        "out": str(arguments.out),
        "vocab_size": tokenizer.vocab_size,
        "seconds": round(time.monotonic() - started, 2),
    }
    line = f"{result['out']}: {result['vocab_size']:,} ids in {result['seconds']} s"
    print(json.dumps(result) if arguments.json else line)


def _encode(arguments: Any) -> None:
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    tokenizer = _open(arguments.path)
    ids = tokenizer.encode(text, bos=arguments.bos, parse_special=not arguments.plain)
    if arguments.json:
        print(
            json.dumps(
                {"ids": ids, "tokens": [_shown(tokenizer, number) for number in ids], "count": len(ids)}
            )
        )
    else:
        print(*ids)


def _decode(arguments: Any) -> None:
    text = _open(arguments.path).decode(arguments.ids, skip_special_tokens=arguments.plain)
    print(json.dumps({"text": text, "count": len(arguments.ids)}) if arguments.json else text)


def _open(path: Path) -> Any:
    from nanohybrid.checkpoint import resolve
    from nanohybrid.gguf import is_gguf
    from nanohybrid.text import Tokenizer

    path = resolve(path, weights=False)
    whole = path.is_dir() or is_gguf(path)
    return Tokenizer.from_directory(path) if whole else Tokenizer.from_file(path)


def _shown(tokenizer: Any, number: int) -> str:
    raw: bytes = tokenizer.token_bytes(number, skip_special_tokens=False)
    return raw.decode("utf-8", "backslashreplace")


def _texts(files: list[Path]) -> Iterator[str]:
    """The texts of the files, in chunks of whole lines, each of about a megabyte."""
    for file in files:
        try:
            with file.open(encoding="utf-8") as stream:
                while lines := stream.readlines(CHUNK_CHARACTERS):
                    yield "".join(lines)
        except FileNotFoundError:
            raise InputError(f"{file}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from None
