"""`nanohybrid serve`: the OpenAI-compatible server."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import API_KEY, command_parser, print_json, spelled
from nanohybrid.cli.model_flags import (
    add_model_flags,
    check_choice,
    locate,
    open_model,
    random_dtype,
    tell_of_template,
    usable_device,
)
from nanohybrid.cli.plan_serve import facts as plan_facts
from nanohybrid.cli.plan_serve import lines as plan_lines
from nanohybrid.cli.plan_serve import opened
from nanohybrid.errors import InputError
from nanohybrid.estimate.serving import STEP_TOKENS, plan_overcommitted, plan_serve, plan_slots

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.estimate.serving import ServePlan
    from nanohybrid.serve.limits import Limits
    from nanohybrid.serve.service import Service

RENAMED = {
    "--model-name": "--served-model-name",
    "--max-context": "--max-model-len",
    "--step-tokens": "--max-num-batched-tokens",
    "--max-queued": "--max-queue",
    "--max-running-per-key": "--max-requests-per-key",
    "--cache-gib": "--prefix-cache-gib",
}
SUMMARY = "an OpenAI-compatible server, with a chat page"
DEFAULT_SLOTS = 16  # without --memory-gib
MAX_SLOTS = (
    256  # with --memory-gib and without --max-num-seqs: a step of more sequences takes too long for a chat
)


def parser() -> "jsonargparse.ArgumentParser":
    from nanohybrid.serve.limits import Limits

    result = command_parser("serve", SUMMARY)
    add_model_flags(result)
    result.set_defaults({"max_num_seqs": None})
    result.add_argument("--seed", type=int, default=0, metavar="S", help="of --random-weights")
    result.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="HOST",
        help="the address to listen on; others than loopback need keys",
    )
    result.add_argument("--port", type=int, default=8000, metavar="N", help="0 selects a free port")
    result.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="what clients call the model (default: the directory's name)",
    )
    result.add_argument(
        "--memory-gib",
        type=float,
        metavar="G",
        help="memory for everything; slots and pages follow from it (plan serve)",
    )
    result.add_argument(
        "--max-model-len",
        type=int,
        default=8192,
        metavar="N",
        help="tokens of the longest request, prompt and answer together",
    )
    result.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=STEP_TOKENS,
        metavar="N",
        help="tokens that one step computes at most",
    )
    result.add_argument(
        "--overcommit",
        action="store_true",
        help="admit by what a prompt needs; where pages run out, the youngest request is preempted",
    )
    result.add_argument(
        "--deterministic", action="store_true", help="no other request changes a bit of an answer; slower"
    )
    result.add_argument(
        "--max-queue",
        type=int,
        default=128,
        metavar="N",
        help="requests that may wait for a slot; the next one gets 429",
    )
    result.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"API keys, one a line; or one in the environment variable {API_KEY}",
    )
    result.add_argument(
        "--max-requests-per-key",
        type=int,
        metavar="N",
        help="requests of one key that may run and wait at once",
    )
    result.add_argument("--no-keys", action="store_true", help="listen beyond loopback without keys")
    result.add_argument(
        "--thinking-budget", type=int, metavar="N", help="tokens of thinking where a request does not say"
    )
    result.add_argument(
        "--thinking-grace",
        type=int,
        default=500,
        metavar="N",
        help="... and tokens to wait for a newline at most",
    )
    result.add_argument(
        "--prefix-cache-gib",
        type=float,
        default=1.0,
        metavar="G",
        help="host memory for the prefix cache; 0 turns it off",
    )
    result.add_argument(
        "--drain-seconds",
        type=int,
        default=60,
        metavar="N",
        help="seconds that requests in progress may take after SIGTERM",
    )
    result.renamed(RENAMED)
    limits = result.add_argument_group("limits, beyond which a request is refused")
    for field in dataclasses.fields(Limits):
        kind = type(field.default)
        limits.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            metavar="N",
            help=field.metadata["help"],
        )
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Load the model, print the address, serve. Returns 0 after SIGTERM, 1 where the engine failed."""
    from nanohybrid.extras import require

    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    _check(arguments)
    keys = read_keys(arguments.api_key_file)
    if not keys and not arguments.no_keys and arguments.host not in ("127.0.0.1", "::1", "localhost"):
        raise InputError(
            f"--host {arguments.host} can be reached by others: give --api-key-file FILE, or --no-keys"
        )
    if arguments.max_requests_per_key is not None and not keys:
        raise InputError("--max-requests-per-key needs keys: give --api-key-file FILE")
    limits = _limits(arguments)
    check_choice(arguments)
    locate(arguments)
    plan, lines = _plan(arguments)
    arguments.max_num_seqs = plan.slots
    llm = open_model(
        arguments,
        max_model_len=arguments.max_model_len,
        max_num_batched_tokens=plan.step_tokens,
        num_kv_pages=plan.pages,
        overcommit=arguments.overcommit,
        prefix_cache_bytes=int(arguments.prefix_cache_gib * 2**30),
        deterministic=arguments.deterministic,
    )
    tell_of_template(llm)

    from nanohybrid.serve.server import serve
    from nanohybrid.serve.service import Service, Settings, model_name

    settings = Settings(
        model_name=arguments.served_model_name or model_name(arguments.path, arguments.preset),
        max_queue=arguments.max_queue,
        thinking_budget=arguments.thinking_budget,
        thinking_grace=arguments.thinking_grace,
        api_keys=keys,
        max_requests_per_key=arguments.max_requests_per_key,
    )
    service = Service(llm, settings, limits)
    _announce(service, arguments, plan, lines)
    return serve(service, arguments.host, arguments.port, arguments.drain_seconds)


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The API keys of the file and the environment, without empty lines and lines that begin with #.

    Raises InputError where the file cannot be read or has no key.
    """
    keys = [key] if (key := os.environ.get(API_KEY, "").strip()) else []
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file {path}: {getattr(error, 'strerror', None) or error}") from None
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InputError(f"--api-key-file {path} has no key; it needs one a line")
    return tuple(keys)


def _plan(arguments: "jsonargparse.Namespace") -> "tuple[ServePlan, list[str]]":
    """The memory plan, before a weight is read, and its lines to print.

    Raises InputError where the memory does not suffice.
    """
    config, dtype, footprint = opened(arguments, random_dtype)
    context = min(arguments.max_model_len, config.max_position_embeddings)
    on_cpu = usable_device(arguments.device) == "cpu"  # else the prefix cache is in another memory
    cache = int(arguments.prefix_cache_gib * 2**30) if on_cpu else 0
    budget = int((arguments.memory_gib or 0) * 2**30)
    step = arguments.max_num_batched_tokens, cache, arguments.num_speculative_tokens
    slots = arguments.max_num_seqs or DEFAULT_SLOTS
    if not budget:
        plan = plan_slots(config, footprint, slots, context, *step)
    elif arguments.overcommit:
        plan = plan_overcommitted(config, footprint, budget, context, slots, *step)
    else:
        plan = plan_serve(config, footprint, budget, context, arguments.max_num_seqs or MAX_SLOTS, *step)
    title, rows = plan_lines(plan, footprint, dtype)
    width = max(len(name) for name, _ in rows)
    return plan, [title, *(f"  {name:<{width}}  {value:>11}" for name, value in rows)]


def _limits(arguments: "jsonargparse.Namespace") -> "Limits":
    from nanohybrid.serve.limits import Limits

    values = {field.name: arguments[field.name] for field in dataclasses.fields(Limits)}
    for name, value in values.items():
        if value <= 0:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    return Limits(**values)


def _check(arguments: "jsonargparse.Namespace") -> None:
    minimums = {
        "max_model_len": 2,
        "max_queue": 0,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 1,
        "max_requests_per_key": 1,
        "prefix_cache_gib": 0,
        "thinking_budget": 0,
        "thinking_grace": 0,
        "drain_seconds": 0,
        "port": 0,
    }
    for name, bound in minimums.items():
        value = arguments[name]
        if value is not None and value < bound:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {bound}")
    if arguments.memory_gib is not None and not 0 < arguments.memory_gib < 2**30:
        raise InputError(f"--memory-gib is {arguments.memory_gib}; it must be positive")
    if arguments.overcommit and arguments.memory_gib is None:
        raise InputError(
            "--overcommit needs --memory-gib G: without a limit there are pages for all sequences"
        )
    if arguments.deterministic and arguments.num_speculative_tokens:
        raise InputError(
            "--deterministic contradicts --num-speculative-tokens: "
            "several tokens that are computed at once round differently; give one of the two"
        )
    if arguments.port > 65535:
        raise InputError(f"--port is {arguments.port}; the largest is 65535")


def _announce(
    service: "Service", arguments: "jsonargparse.Namespace", plan: "ServePlan", lines: list[str]
) -> None:
    keys = service.settings.api_keys
    url, context, queue = f"http://{arguments.host}:{arguments.port}", service.context, arguments.max_queue
    facts = {
        "url": url,
        "model": service.settings.model_name,
        "max_num_seqs": plan.slots,
        "max_model_len": context,
        "max_queue": queue,
        "keys": len(keys),
        "plan": plan_facts(plan, spelled(service.llm.model.dtype)),
    }
    if arguments.json:
        print_json(facts)
    else:
        access = f"{len(keys)} API keys" if keys else "no API key is needed"
        slots = f"{plan.slots} requests at once of {context:,} tokens each, {queue} more may wait"
        print(*lines, sep="\n", file=sys.stderr)
        print(f"{facts['model']}: {url} (chat page), {url}/v1 (API)\n{slots}; {access}", file=sys.stderr)
    sys.stdout.flush()
