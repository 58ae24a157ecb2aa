"""Prefill of the 9B: one prompt in chunks, against the rate of matrix products, and the share of the scan.

Operations: 2 for each token and each weight but the embedding's and the head's, plus those of the scan and of
attention.
"""

from collections.abc import Callable
from functools import partial

import torch
from bench import Bench, milliseconds

from nanohybrid.config import HybridConfig
from nanohybrid.engine.random_weights import random_model
from nanohybrid.estimate import Footprint
from nanohybrid.executors import executor_for
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.ops.ssd_scan import ssd_scan
from nanohybrid.presets import preset

TITLE = (
    "A prompt through the 9B in chunks of at most 8,192 tokens; the scan alone at the last chunk's length."
)
LENGTHS, CHUNK_TOKENS = (512, 2048, 8192, 32_768), 8192


def run(bench: Bench, emit: Callable[[dict], None]) -> None:
    config = preset("tiny" if bench.toy else "nano-9b-v2")
    dtype = torch.float32 if bench.toy else torch.bfloat16
    model = random_model(config, dtype, device=str(bench.device))
    for length in (40, 130) if bench.toy else LENGTHS:
        cache = HybridCache.for_context(config, 1, length, dtype, bench.device)
        tokens = torch.randint(config.vocab_size, (length,), device=bench.device)
        median, minimum, maximum = milliseconds([partial(prefill, model, tokens, cache)], bench.device)
        scan, *_ = milliseconds(
            [scan_of(config, min(length, CHUNK_TOKENS), dtype, bench.device)], bench.device
        )
        layers = config.pattern.count("M") * length / min(length, CHUNK_TOKENS)
        roofline, bound = bench.roofline(0, operations(config, length))
        row = {
            "tokens": length,
            "ms": median,
            "min_ms": minimum,
            "max_ms": maximum,
            "roofline_ms": roofline,
            "fraction": roofline / median,
        }
        emit(row | {"tokens/s": 1e3 * length / median, "scan_share": scan * layers / median, "bound": bound})


@torch.inference_mode()
def prefill(model: HybridLM, tokens: torch.Tensor, cache: HybridCache) -> torch.Tensor:
    """Logits [1, V] of the last token, by the engine's executor, in chunks of CHUNK_TOKENS tokens."""
    length, executor = len(tokens), executor_for(model, cache)
    for begin in range(0, length, CHUNK_TOKENS):
        end = min(begin + CHUNK_TOKENS, length)
        layout = Layout.contiguous([end - begin], [begin], [0], length)
        wanted = [end - begin - 1] if end == length else []
        _, logits = executor.run(tokens[begin:end], layout, wanted)
    return logits


def scan_of(config: HybridConfig, T: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The scan of one layer."""
    H, P, G, N = config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size
    x, B, C = (torch.randn(T, *shape, device=device).to(dtype) for shape in ((H, P), (G, N), (G, N)))
    dt, A, D = (
        torch.rand(T, H, device=device) * 0.1,
        -torch.rand(H, device=device) * 8,
        torch.randn(H, device=device),
    )
    return partial(torch.no_grad()(ssd_scan), x, dt, A, B, C, D, Layout.contiguous([T], [0], [0], T))


def operations(config: HybridConfig, length: int) -> float:
    parts = Footprint.of(config).parameters_by_part
    weights = sum(count for part, count in parts.items() if part not in ("embedding", "head"))
    inner, Q = config.mamba_inner_size, 128
    scan = length * (
        4 * inner * config.ssm_state_size + Q * inner + Q * config.n_groups * config.ssm_state_size
    )
    attention = (
        2 * length**2 * config.num_attention_heads * config.head_dim
    )  # half of the square, two products
    return 2.0 * weights * length + config.pattern.count("M") * scan + config.pattern.count("*") * attention
