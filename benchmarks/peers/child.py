"""What the peers' children share: their flags, the prompt of the check, and figures as ours are printed."""

import argparse
import random
import resource
import statistics

CHECK_TOKENS = 64
REPEATS = 3
LONG, WARM_TOKENS = (
    4096,
    128,
)  # a prompt longer than LONG is warmed up for by so many tokens, as `nanohybrid bench generate` does


def arguments(what: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help=what)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="after one that warms up")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument(
        "--logits", metavar="FILE", help="write the logits after the prompt of the check, and time nothing"
    )
    return parser.parse_args()


def prompts(vocabulary: int, count: int, tokens: int) -> list[list[int]]:
    """Random ids, the same for every engine; the lowest ones are special tokens."""
    draw = random.Random(0)
    return [[draw.randrange(20, vocabulary) for _ in range(tokens)] for _ in range(count)]


def turns(given: argparse.Namespace) -> list[int]:
    """How much of each prompt is read at each repetition, the first of which warms up."""
    return [min(given.prompt_tokens, WARM_TOKENS if given.prompt_tokens > LONG else given.prompt_tokens)] + [
        given.prompt_tokens
    ] * given.repeats


def figures(prefill: list[float], decode: list[float], versions: dict[str, str]) -> dict[str, object]:
    """Tokens per second of each repetition, as the contract of `nanohybrid bench generate` has them."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "prefill_tokens_per_second": spread(prefill), "decode_tokens_per_second": spread(decode),
        "peak_memory_bytes": peak, "versions": versions,
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
