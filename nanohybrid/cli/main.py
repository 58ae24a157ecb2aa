"""The command `nanohybrid`: runs the module of a subcommand, and reports errors in one line.

No large package is imported here, so `--help` and errors in the arguments do not wait for torch.
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

from nanohybrid.cli.plugins import load_mixers
from nanohybrid.errors import InputError, NanohybridError
from nanohybrid.version import VERSION

if TYPE_CHECKING:
    import jsonargparse


@dataclass(frozen=True)
class Command:
    """A command: its module, and its line in `--help`."""

    module: str
    summary: str


class CommandModule(Protocol):
    """The interface of a command's module."""

    SUMMARY: str

    def parser(self) -> "jsonargparse.ArgumentParser": ...

    def run(self, arguments: "jsonargparse.Namespace") -> int | None: ...


GROUPS: dict[str, dict[str, Command]] = {
    "the whole pipeline at a small scale": {
        "quickstart": Command(
            "nanohybrid.cli.quickstart", "every stage below on a CPU, from raw text to report.html"
        ),
    },
    "the stages of the pipeline": {
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
        "prune": Command(
            "nanohybrid.cli.prune",
            "a model -> a smaller one by given sizes or layers (the first half of compress)",
        ),
        "distill": Command(
            "nanohybrid.cli.distill", "train a pruned model towards its teacher (the second half of compress)"
        ),
        "quantize": Command(
            "nanohybrid.cli.quantize", "a model -> the same with its matrices in int8, int4 or FP8"
        ),
        "evaluate": Command("nanohybrid.cli.evaluate", "accuracy, accuracy vs. thinking budget, decode time"),
    },
    "use a model": {
        "generate": Command("nanohybrid.cli.generate", "prompts in, text out; thinking within a budget"),
        "chat": Command("nanohybrid.cli.chat", "talk with a model in the terminal"),
        "serve": Command("nanohybrid.cli.serve", "an OpenAI-compatible server, with a chat page"),
        "init": Command("nanohybrid.cli.init", "a checkpoint of random weights, for tests and measurements"),
        "bench": Command(
            "nanohybrid.cli.bench",
            "measured speed of a model, a server, two models compared (generate, serve, compare)",
        ),
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
    """Run one command.

    Returns the exit code: 0, 1 (a check failed), 2 (bad arguments or input), 130 (interrupted).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    set_encoding_errors()
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except NanohybridError as error:
        return report_error(str(error))
    except MemoryError:
        return report_error("out of memory: use smaller sizes, or a machine with more memory")
    except KeyboardInterrupt:
        print(
            f"nanohybrid: stopped{'; the same command resumes' if resumes(arguments) else ''}",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # otherwise the interpreter reports an error at exit
        return 141
    except OSError as error:  # a full disk, a directory without write permission
        return report_error(f"{error.filename or 'a file'}: {error.strerror or error}")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        return report_error("out of memory: use smaller sizes, or a machine with more memory")


def run(arguments: list[str]) -> int:
    """Print `--help` or `--version`, or run the named command."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"nanohybrid {VERSION}")
        return 0
    load_mixers()
    return run_command(arguments[0], arguments[1:])


def run_command(name: str, arguments: list[str]) -> int:
    """Import the module of a command, parse its arguments and run it. Raises InputError for bad arguments."""
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
    except SystemExit as stop:  # --help was printed
        return stop.code if isinstance(stop.code, int) else 0
    return module.run(parsed) or 0


def resumes(arguments: list[str]) -> bool:
    """Whether an interrupted command resumes when it is repeated: stages do, and `generate --input`."""
    return arguments[0] not in GROUPS["use a model"] or "--input" in arguments


def check_environment() -> None:
    """Raise InputError for a NANOHYBRID_KERNELS that does not exist or cannot run here."""
    from nanohybrid.ops.dispatch import FORMS, interpreted

    forced = os.environ.get("NANOHYBRID_KERNELS", "")
    if forced and forced not in FORMS:
        raise InputError(
            f"NANOHYBRID_KERNELS is {forced!r}; known are {', '.join(FORMS)}; unset it for the fastest"
        )
    if forced == "triton" and not interpreted():
        import torch

        if not torch.cuda.is_available():
            raise InputError(
                "NANOHYBRID_KERNELS is 'triton', but there is no CUDA GPU; unset it, or set "
                "TRITON_INTERPRET=1 to run the kernels slowly"
            )


def set_encoding_errors() -> None:
    """Write characters outside the terminal's encoding as escapes; read invalid UTF-8, which is refused where
    it is used."""
    for stream, errors in (
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def unknown(name: str) -> str:
    """The error for an unknown command, with the most similar known one."""
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    return f"unknown command {name!r}: {hint}"


def overview() -> str:
    """The text of `nanohybrid --help`."""
    lines = ["usage: nanohybrid COMMAND ...", ""]
    lines += [
        "Hybrid Mamba-2 / attention language models: data, training, alignment, compression, evaluation, "
        "serving.",
        "",
    ]
    for title, group in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<11} {command.summary}" for name, command in group.items()), ""]
    lines.append(
        "See nanohybrid COMMAND --help. Every command has --json. An interrupted stage resumes when the "
        "command is repeated."
    )
    return "\n".join(lines)


def report_error(message: str) -> int:
    """Print an error as one line to stderr. Returns the exit code 2."""
    print(f"nanohybrid: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
