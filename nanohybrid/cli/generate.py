"""`nanohybrid generate`: one prompt to the terminal, or a file of prompts to a file of answers."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser, print_json
from nanohybrid.cli.completion import as_json, chat_wanted, thinking_wanted
from nanohybrid.cli.model_flags import (
    Clock,
    add_model_flags,
    add_sampling_flags,
    add_structured_output_flags,
    open_model,
    sampling_params,
    structured_outputs,
)
from nanohybrid.errors import InputError
from nanohybrid.stages.lineage import peak_memory_bytes

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.engine import LLM, Completion, SamplingParams

SUMMARY = "prompts in, text out; thinking within a budget"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("generate", SUMMARY)
    add_model_flags(result)
    result.add_argument("--prompt", metavar="TEXT", help="the prompt; `-` reads it from standard input")
    result.add_argument(
        "--input",
        type=Path,
        metavar="FILE.jsonl",
        help='a file of prompts: each line is {"prompt": ...} or {"messages": [...]}',
    )
    result.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="their answers, one line each in the same order; an interrupted run resumes",
    )
    result.add_argument("--chat", action="store_true", help="--prompt is a user message in the chat format")
    result.add_argument(
        "--raw",
        action="store_true",
        help="--prompt is the text itself, special tokens are parsed (the default without a thinking flag)",
    )
    result.add_argument("--system", metavar="TEXT", help="a system message before it; implies --chat")
    result.add_argument("--think", action="store_true", help="think before the answer; implies --chat")
    result.add_argument("--no-think", action="store_true", help="answer at once; implies --chat")
    add_sampling_flags(result, max_new_tokens=256)
    add_structured_output_flags(result)
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Generate. The text goes to stdout and figures to stderr; with --json both are one object on stdout."""
    _check(arguments)
    params = sampling_params(arguments, structured_outputs(arguments))
    if arguments.input is not None:
        from nanohybrid.cli.batch import generate_file

        generate_file(arguments, params)
        return 0
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    llm = open_model(arguments)
    prompt = _encode(llm, text, arguments)
    if chat_wanted(arguments):
        params = replace(params, may_think=llm.may_think(prompt))
    clock = Clock()
    completion = _stream(llm, prompt, params, quiet=arguments.json)
    figures = {
        "tokens": len(completion.token_ids),
        "seconds": clock.seconds,
        "tokens_per_second": len(completion.token_ids) / clock.seconds,
    }
    figures["peak_memory_bytes"] = peak_memory_bytes()
    if arguments.json:
        print_json({**as_json(completion), **figures})
    else:
        ended = ""
        if completion.thinking_end != "none":
            ended = f", thinking {completion.thinking_tokens} ({completion.thinking_end})"
        print(
            f"{figures['tokens']} tokens{ended}, {figures['tokens_per_second']:.1f} tokens/s, "
            f"{figures['peak_memory_bytes'] / 2**30:.2f} GiB at most",
            file=sys.stderr,
        )
    return 0


def _encode(llm: "LLM", text: str, arguments: "jsonargparse.Namespace") -> list[int]:
    if not chat_wanted(arguments):
        return llm.encode(text)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return llm.encode_chat([*system, {"role": "user", "content": text}], thinking_wanted(arguments))


def _stream(llm: "LLM", prompt: Sequence[int], params: "SamplingParams", quiet: bool) -> "Completion":
    from nanohybrid.engine.engine import completed

    engine = llm.engine([prompt], params.max_tokens)
    request = engine.add(prompt, params, stream=True)
    while not request.finished:
        engine.step()
        text = request.take_text()
        if text and not quiet:
            print(text, end="", flush=True)
    if not quiet:
        print()
    return completed(request)


def _check(arguments: "jsonargparse.Namespace") -> None:
    if (arguments.prompt is None) == (arguments.input is None):
        raise InputError("give --prompt TEXT, or --input FILE.jsonl --output FILE.jsonl: one of the two")
    if (arguments.input is None) != (arguments.output is None):
        raise InputError(
            "--input and --output go together: one names the prompts, the other the file for their answers"
        )
    if arguments.think and (arguments.no_think or arguments.raw):
        raise InputError(
            f"--think contradicts {'--no-think' if arguments.no_think else '--raw'}: give one of the two"
        )
    if arguments.no_think and arguments.thinking_budget is not None:
        raise InputError("--no-think contradicts --thinking-budget: give one of the two")
