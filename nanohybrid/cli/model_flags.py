"""Flags that several commands share: which model, where it runs, how it samples. And what they open."""

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanohybrid.cli.common import DTYPES, FORMATS, MODEL, precision
from nanohybrid.engine.prompt_lookup import MOST_DRAFT_TOKENS
from nanohybrid.errors import InputError

if TYPE_CHECKING:
    import jsonargparse
    import torch

    from nanohybrid.cli.parser import CommandParser
    from nanohybrid.config import HybridConfig
    from nanohybrid.engine import LLM, SamplingParams, StructuredOutputs

DEVICE = "auto, cpu, cuda or cuda:1; auto is cuda where there is one"
LARGE = 1_000_000_000  # parameters from which on random weights are bf16 by default


def add_shape_flags(parser: "jsonargparse.ArgumentParser") -> None:
    """Which model, for commands that need no more than its configuration; checked by `check_shape`."""
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="PATH",
        help=f"{MODEL}; config.json alone is enough",
    )
    parser.add_argument("--preset", metavar="NAME", help="a configuration by name instead")


def add_choice_flags(parser: "jsonargparse.ArgumentParser") -> None:
    """Which model, and where it runs; checked by `check_choice` and `usable_device`."""
    parser.add_argument("path", type=Path, nargs="?", metavar="PATH", help=MODEL)
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="a configuration by name instead of a checkpoint; with --random-weights",
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="random weights, to measure speed and memory"
    )
    add_device_flag(parser)


def add_device_flag(
    parser: "jsonargparse.ArgumentParser", flag: str = "--device", what: str = "where it runs"
) -> None:
    """Where a command computes; checked by `usable_device`. No recipe has it: it depends on the machine."""
    parser.add_argument(flag, default="auto", metavar="DEVICE", help=f"{what}: {DEVICE}")


def add_model_flags(parser: "CommandParser", *, batched: bool = True) -> None:
    """Which model, in which precision, and how the engine is set up; `open_model` reads them.

    batched: whether the command runs several sequences at once.
    """
    add_choice_flags(parser)
    parser.add_argument(
        "--dtype", choices=["checkpoint", *DTYPES], default="checkpoint", help="precision of the weights"
    )
    parser.add_argument(
        "--quantize",
        choices=["bf16", *FORMATS],
        help="format of the matrices, which are quantized one by one while loading",
    )
    if batched:
        parser.add_argument(
            "--max-num-seqs", type=int, default=64, metavar="N", help="sequences that run at once, at most"
        )
        parser.renamed({"--max-running": "--max-num-seqs"})
    add_cache_dtype_flags(parser)
    add_speculation_flag(parser)


def add_speculation_flag(parser: "CommandParser") -> None:
    """How many tokens are drafted; checked by `check_speculation`."""
    parser.add_argument(
        "--num-speculative-tokens",
        type=int,
        default=0,
        metavar="N",
        help=f"tokens drafted in a step by prompt lookup, 0 to {MOST_DRAFT_TOKENS}; 0 turns it off",
    )
    parser.renamed({"--speculate": "--num-speculative-tokens"})


def add_cache_dtype_flags(parser: "CommandParser") -> None:
    """The precision of recurrent states, keys and values in the cache."""
    parser.add_argument(
        "--mamba-ssm-cache-dtype",
        choices=["fp32", "fp16"],
        default="fp32",
        help="of SSM states; fp16 is rounded stochastically",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=["auto", "fp8"],
        default="auto",
        help="of keys and values; auto: the model's",
    )
    parser.renamed({"--state-dtype": "--mamba-ssm-cache-dtype", "--kv-dtype": "--kv-cache-dtype"})


def add_sampling_flags(
    parser: "jsonargparse.ArgumentParser",
    max_new_tokens: int,
    temperature: float | None = 0.0,
    top_p: float | None = 1.0,
) -> None:
    """How tokens are sampled, with these defaults; `sampling_params` reads the flags."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help="tokens to write at most, thinking included",
    )
    parser.add_argument("--temperature", type=float, default=temperature, metavar="T", help="0 is greedy")
    parser.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        metavar="P",
        help="sample from the most probable tokens that together reach this probability",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K most probable tokens; 0 is all"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="remove tokens less than P times as probable as the most probable one",
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="equal seeds give equal texts; without it, a new seed each time"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="continue past EOS, up to --max-new-tokens")
    parser.add_argument(
        "--thinking-budget", type=int, metavar="N", help="end the trace at the next newline after N tokens"
    )
    parser.add_argument(
        "--thinking-grace", type=int, default=500, metavar="N", help="... and N tokens later at the latest"
    )


def add_structured_output_flags(parser: "jsonargparse.ArgumentParser") -> None:
    """What the answer must match, at most one of these; `structured_outputs` reads them.

    The first four names are llama.cpp's.
    """
    group = parser.add_argument_group("structured output, one of")
    group.add_argument(
        "--json-schema", metavar="SCHEMA", help="the answer is JSON that is valid under this JSON schema"
    )
    group.add_argument("--json-schema-file", type=Path, metavar="FILE", help="the same, read from a file")
    group.add_argument("--grammar", metavar="GRAMMAR", help="a grammar in llguidance's Lark syntax")
    group.add_argument("--grammar-file", type=Path, metavar="FILE", help="the same, read from a file")
    group.add_argument("--json-object", action="store_true", help="the answer is any JSON object")
    group.add_argument("--regex", metavar="PATTERN", help="the whole answer matches (Rust syntax)")
    group.add_argument(
        "--choice", action="append", metavar="TEXT", help="the answer is one of these; repeat it"
    )


def structured_outputs(arguments: "jsonargparse.Namespace") -> "StructuredOutputs | None":
    """The flags of `add_structured_output_flags` as a value; None where there are none.

    Raises InputError for several of them, and for a file that cannot be read.
    """
    from nanohybrid.engine import StructuredOutputs

    names = ("json_schema", "json_schema_file", "grammar", "grammar_file", "json_object", "regex", "choice")
    given = [name for name in names if arguments[name] not in (None, False)]
    if len(given) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in given[:2])
        raise InputError(f"{first} contradicts {second}: give one of the two")
    if not given:
        return None
    name, value = given[0], arguments[given[0]]
    if name.endswith("_file"):
        try:
            value = value.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{arguments[name]}: {getattr(error, 'strerror', None) or error}") from None
    field = "json" if name.startswith("json_schema") else name.removesuffix("_file")
    return StructuredOutputs(**{field: value})


def sampling_params(
    arguments: "jsonargparse.Namespace", structured_outputs: "StructuredOutputs | None" = None
) -> "SamplingParams":
    """The flags of `add_sampling_flags` as a value. Raises InputError where one is out of range."""
    from nanohybrid.engine import SamplingParams

    return SamplingParams(
        max_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        ignore_eos=arguments.ignore_eos,
        thinking_budget=arguments.thinking_budget,
        thinking_grace=arguments.thinking_grace,
        structured_outputs=structured_outputs,
    )


def open_model(arguments: "jsonargparse.Namespace", **engine_options: Any) -> "LLM":
    """Load the checkpoint, or make random weights for the preset.

    engine_options: fields of EngineConfig that have no flag in `add_model_flags`. Raises InputError for flags
    that contradict each other, and what loading raises.
    """
    from nanohybrid.presets import preset

    _check(arguments)
    locate(arguments)
    from nanohybrid.engine import LLM, EngineConfig

    dtype, format = chosen_precision(arguments)
    device = usable_device(arguments.device)
    engine_config = EngineConfig(
        max_num_seqs=arguments.get("max_num_seqs", 1),
        num_speculative_tokens=arguments.num_speculative_tokens,
        mamba_ssm_cache_dtype=arguments.mamba_ssm_cache_dtype,
        kv_cache_dtype=arguments.kv_cache_dtype,
        **engine_options,
    )
    if arguments.path is not None:
        llm = LLM(arguments.path, dtype, device, quantize=format, engine_config=engine_config)
    else:
        config = preset(arguments.preset)
        dtype, seed = dtype or random_dtype(config), arguments.seed or 0
        llm = LLM.random(config, dtype, seed, device, quantize=format, engine_config=engine_config)
    from nanohybrid.executors.cpu.weights import is_packed

    if is_packed(llm.model):
        _tell_of_compiling()
    return llm


def _tell_of_compiling() -> None:
    """Say why the first answer on this machine takes longer."""
    from nanohybrid.ops.numba.jit import has_cached_kernels

    if not has_cached_kernels():
        print("nanohybrid: compiling kernels for this processor, once (about 10 s)", file=sys.stderr)


def tell_of_template(llm: "LLM") -> None:
    """Say on stderr that a checkpoint has no chat template, and what is used in its place."""
    if llm.directory is None or not llm.template.is_default:
        return
    try:
        llm.template.check_vocabulary(llm.tokenizer)
        note = "has no chat template; conversations use the built-in one, in the format of Nemotron Nano 2"
    except InputError as error:
        note = f"cannot chat: {error}"
    print(f"nanohybrid: warning: {llm.directory}: {note}", file=sys.stderr)


def chosen_precision(arguments: "jsonargparse.Namespace") -> "tuple[torch.dtype | None, str | None]":
    """What --dtype and --quantize mean: the dtype of what is not quantized, and the format of the matrices.

    None: as stored. Raises InputError where the two contradict each other.
    """
    wanted = arguments.get("quantize")
    if wanted == "bf16":
        if arguments.dtype not in ("checkpoint", "bf16"):
            raise InputError(f"--quantize bf16 contradicts --dtype {arguments.dtype}: give one of the two")
        if arguments.path is not None:
            from nanohybrid.checkpoint import refuse_quantized

            refuse_quantized(arguments.path, "it cannot be made bf16")
        return precision("bf16")
    dtype, format = precision(arguments.dtype)  # --dtype of `plan serve` names the formats too
    if wanted and format and wanted != format:
        raise InputError(f"--quantize {wanted} contradicts --dtype {format}: give one of the two")
    return dtype, wanted or format


def random_dtype(config: "HybridConfig") -> "torch.dtype":
    """The dtype of random weights where no flag says: bf16 for large models, else fp32."""
    import torch

    from nanohybrid.estimate.footprint import Footprint

    return torch.bfloat16 if Footprint.of(config).parameters >= LARGE else torch.float32


class Clock:
    """A stopwatch that runs from its creation."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self.began, 1e-9)


def _check(arguments: "jsonargparse.Namespace") -> None:
    check_choice(arguments)
    if arguments.get("max_num_seqs", 1) < 1:
        raise InputError(f"--max-num-seqs is {arguments.max_num_seqs}; it must be at least 1")
    check_speculation(arguments.num_speculative_tokens)


def check_speculation(tokens: int) -> None:
    """Raise InputError for a number of speculative tokens that is out of range."""
    if not 0 <= tokens <= MOST_DRAFT_TOKENS:
        raise InputError(f"--num-speculative-tokens is {tokens}; it must be from 0 to {MOST_DRAFT_TOKENS}")


def check_shape(arguments: "jsonargparse.Namespace") -> None:
    """Raise InputError unless the flags name one configuration."""
    if (arguments.path is None) == (arguments.preset is None):
        raise InputError("name a checkpoint directory, or --preset NAME: one of the two")


def check_choice(arguments: "jsonargparse.Namespace") -> None:
    """Raise InputError unless the flags name one model: a checkpoint, or a preset with random weights."""
    check_seed(arguments.seed)
    if (arguments.path is None) == (arguments.preset is None):
        raise InputError("name a checkpoint directory, or --preset NAME --random-weights: one of the two")
    if arguments.preset is not None and not arguments.random_weights:
        raise InputError("a preset has no weights: add --random-weights, or name a checkpoint directory")
    if arguments.path is not None and arguments.random_weights:
        raise InputError("--random-weights goes with --preset NAME, a checkpoint has its own weights")


def locate(arguments: "jsonargparse.Namespace", weights: bool = True) -> None:
    """Replace what the user calls the model by where its files are, downloaded if it is an id of the Hub.

    weights: whether its weights are needed too. Raises CheckpointError where they cannot be had.
    """
    if arguments.path is not None:
        from nanohybrid.checkpoint import resolve

        arguments.path = resolve(arguments.path, weights)


def usable_device(name: str, flag: str = "--device") -> str:
    """The device that a flag names, after a trial: cpu, cuda or cuda:N.

    Raises InputError where this machine does not have it.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(1, device=name).is_meta:
            raise RuntimeError("it stores no numbers")
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\. |\n", str(error))[0][:150]
        raise InputError(
            f"{flag} {name} cannot be used ({reason}); take cpu, or cuda where a GPU is"
        ) from None
    if name.startswith("cuda"):
        # Triton launches kernels on the current device, whatever the device of their tensors.
        torch.cuda.set_device(torch.device(name).index or 0)
    return name


def set_threads(threads: int | None) -> None:
    """Set how many threads torch uses on a CPU; None leaves its default. Raises InputError below 1."""
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads is {threads}; it must be at least 1")
    import torch

    torch.set_num_threads(threads)


def check_seed(seed: int | None) -> None:
    """Raise InputError for a seed that torch's generators do not accept."""
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"--seed is {seed}: give a number from 0 to 2^63 - 1")
