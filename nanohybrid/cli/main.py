"""The command `nanohybrid`: finds the one module that a command needs, and turns what goes wrong into one line.

Nothing heavy is imported here: `--help` must answer at once, and a typing mistake must not wait for torch.
"""

import argparse
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nanohybrid.errors import InputError, NanohybridError
from nanohybrid.version import VERSION

if TYPE_CHECKING:
    import jsonargparse


@dataclass(frozen=True)
class Command:
    """A command: the module that holds it, and the line that `--help` shows for it."""

    module: str
    summary: str


class CommandModule(Protocol):
    """What a command's module must hold."""

    SUMMARY: str

    def parser(self) -> "jsonargparse.ArgumentParser": ...

    def run(self, arguments: "jsonargparse.Namespace") -> int | None: ...


GROUPS: dict[str, dict[str, Command]] = {
    "the whole pipeline in miniature": {
        "quickstart": Command(
            "nanohybrid.cli.quickstart", "every stage below on a CPU, from raw text to report.html"
        ),
    },
    "the pipeline, a stage a command": {
        "data": Command("nanohybrid.cli.data", "raw text -> filtered, deduplicated, tokenized documents"),
        "tokenizer": Command("nanohybrid.cli.tokenizer", "train or convert a tokenizer"),
        "pretrain": Command("nanohybrid.cli.pretrain", "documents -> a base model"),
        "align": Command(
            "nanohybrid.cli.align",
            "post-training: SFT on chats, GRPO on verifiable rewards, merging (sft, grpo, merge)",
        ),
        "compress": Command(
            "nanohybrid.cli.compress", "a model -> a smaller one in a given memory (prune, then distill)"
        ),
        "prune": Command("nanohybrid.cli.prune", "only the first half of compress"),
        "distill": Command("nanohybrid.cli.distill", "only the second half of compress"),
        "quantize": Command(
            "nanohybrid.cli.quantize", "a model -> the same with its matrices in int8, int4 or FP8"
        ),
        "evaluate": Command("nanohybrid.cli.evaluate", "accuracy, accuracy vs. thinking budget, decode time"),
    },
    "with a model": {
        "generate": Command("nanohybrid.cli.generate", "prompts in, text out; thinking within a budget"),
        "chat": Command("nanohybrid.cli.chat", "talk with it in the terminal"),
        "serve": Command("nanohybrid.cli.serve", "an OpenAI-compatible server, with a chat page"),
        "init": Command("nanohybrid.cli.init", "a checkpoint of random weights, to measure and to test with"),
        "bench": Command("nanohybrid.cli.bench", "how fast it is, measured (generate, serve, headline)"),
        "inspect": Command("nanohybrid.cli.inspect", "layers, parameters, memory; what fits where"),
        "plan": Command(
            "nanohybrid.cli.plan",
            "what fits a memory, and how fast it can be, before a weight is read (compress, serve, train)",
        ),
        "export": Command("nanohybrid.cli.export", "export a checkpoint to other programs (gguf: llama.cpp)"),
        "verify": Command(
            "nanohybrid.cli.verify",
            "check that every executor, packing, chunking, caching and saving give the same numbers",
        ),
    },
}

COMMANDS: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (a check failed), 2 (the user can mend it), 130 (stopped)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    forgive_encodings()
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except NanohybridError as error:
        return complain(str(error))
    except MemoryError:
        return complain("the memory does not hold this: use smaller sizes, or a machine with more")
    except KeyboardInterrupt:
        print(
            f"nanohybrid: stopped{'; the same command resumes' if resumes(arguments) else ''}",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 141
    except OSError as error:  # a full disk, a directory that may not be written
        return complain(f"{error.filename or 'a file'}: {error.strerror or error}")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        return complain("the memory does not hold this: use smaller sizes, or a machine with more")


def run(arguments: list[str]) -> int:
    """Answer `--help` and `--version`, or hand the arguments to the command they name."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"nanohybrid {VERSION}")
        return 0
    return run_command(arguments[0], arguments[1:])


def run_command(name: str, arguments: list[str]) -> int:
    """Import the module of the command `name`, parse its arguments and run it."""
    if name not in COMMANDS:
        raise InputError(unknown(name))
    from nanohybrid.stages.recipe import one_line

    check_environment()
    module: CommandModule = importlib.import_module(COMMANDS[name].module)
    parser = module.parser()
    parser.exit_on_error = False
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{name}: {one_line(error)} (see nanohybrid {name} --help)") from None
    except SystemExit as stop:  # --help and --print-...: done
        return stop.code if isinstance(stop.code, int) else 0
    return module.run(parsed) or 0


def resumes(arguments: list[str]) -> bool:
    """Whether a command that was stopped goes on when it is repeated: a stage does, and answers to a file of prompts."""
    return arguments[0] not in GROUPS["with a model"] or "--input" in arguments


def check_environment() -> None:
    """Refuse a form of the ops that does not exist, or cannot run here, before any work is done."""
    from nanohybrid.ops.dispatch import FORMS, interpreted

    forced = os.environ.get("NANOHYBRID_KERNELS", "")
    if forced and forced not in FORMS:
        raise InputError(
            f"NANOHYBRID_KERNELS is {forced!r}: known are {', '.join(FORMS)}; unset it for the fast ones"
        )
    if forced == "triton" and not interpreted():
        import torch

        if not torch.cuda.is_available():
            raise InputError(
                "NANOHYBRID_KERNELS is 'triton' and there is no CUDA GPU; unset it, or set TRITON_INTERPRET=1 to try kernels slowly"
            )


def forgive_encodings() -> None:
    """Text that the terminal's encoding lacks is written as escapes; bytes that are no UTF-8 are read, and refused where they are used."""
    for stream, errors in (
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def unknown(name: str) -> str:
    """The line for a command that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    return f"there is no command {name!r}: {hint}"


def overview() -> str:
    """The text of `nanohybrid --help`."""
    lines = ["usage: nanohybrid COMMAND ...", ""]
    lines += [
        "A hybrid Mamba-2 / attention language model, from raw text to a compressed, thinking model.",
        "",
    ]
    for title, group in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<11} {command.summary}" for name, command in group.items()), ""]
    lines.append(
        "nanohybrid COMMAND --help tells more; every command takes --json; an interrupted stage resumes when repeated."
    )
    return "\n".join(lines)


def complain(message: str) -> int:
    """Say on one line of stderr what is wrong; returns the exit code."""
    print(f"nanohybrid: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
