"""What the peers' child processes share: their flags, the prompts, and results in our format."""

import argparse
import random
import resource
import statistics

CHECK_TOKENS = 64
REPEATS = 3
LONG_PROMPT, WARM_UP_TOKENS = (
    4096,
    128,
)  # the warm-up of a prompt longer than LONG_PROMPT has so many tokens, as in `nanohybrid bench generate`


def arguments(what: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help=what)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help="measured repetitions, after one warm-up"
    )
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument(
        "--logits", metavar="FILE", help="write the logits after the prompt of the check, and measure nothing"
    )
    return parser.parse_args()


def prompts(vocabulary: int, count: int, tokens: int) -> list[list[int]]:
    """Random ids, the same for every engine. The lowest ids are special tokens and do not occur."""
    draw = random.Random(0)
    return [[draw.randrange(20, vocabulary) for _ in range(tokens)] for _ in range(count)]


def prompt_lengths(given: argparse.Namespace) -> list[int]:
    """The tokens of each prompt at each repetition; the first repetition is the warm-up."""
    return [
        min(given.prompt_tokens, WARM_UP_TOKENS if given.prompt_tokens > LONG_PROMPT else given.prompt_tokens)
    ] + [given.prompt_tokens] * given.repeats


def figures(prefill: list[float], decode: list[float], versions: dict[str, str]) -> dict[str, object]:
    """Tokens per second over the repetitions, with the keys of `nanohybrid bench generate --json`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "prefill_tokens_per_second": spread(prefill), "decode_tokens_per_second": spread(decode),
        "peak_memory_bytes": peak, "versions": versions,
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
