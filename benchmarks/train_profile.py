"""Where the time of a training step goes: torch.profiler's events by part, each with its roofline.

T tokens · E hidden size · F FFN size · C conv channels · D Mamba's inner width · H heads · P head dimension ·
N state size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanohybrid.model import HybridLM
from nanohybrid.model.mixers import MLP, Attention, Mamba2

if TYPE_CHECKING:
    from torch.profiler import profile

# The part of an event: the first row with a pattern that occurs in the event's name or in a caller's.
WHOLE = {
    "loss and head": ("_Summed", "_PerToken"),
    "scan, backward": ("ScanBackward", "ChunkBackward"),
    "scan, forward": ("Scan", "Chunk"),
    "conv": ("_Conv", "_Shifted"),
    "norms": ("_Norm", "rms_norm", "RmsNorm"),
    "squared ReLU": ("_SquaredReLU",),
    "attention": ("scaled_dot_product",),
    "optimizer": ("Optimizer.", "clip", "linalg_vector_norm"),
}
# Otherwise the row that matches the nearest name.
NEAREST = {
    "casts": ("aten::to", "_to_copy", "ToCopyBackward"),
    "projections": ("aten::linear", "aten::mm", "MmBackward", "aten::addmm"),
}
REST = "rest"


def group(names: list[str]) -> str:
    """The part of an event, from its own name and those of its callers, nearest first."""
    for name, patterns in WHOLE.items():
        if any(pattern in one for one in names for pattern in patterns):
            return name
    for one in names:
        for name, patterns in NEAREST.items():
            if any(pattern in one for pattern in patterns):
                return name
    return REST


def milliseconds(found: profile) -> dict[str, float]:
    """Milliseconds of each part: the time of its events without the time of nested calls."""
    result = dict.fromkeys([*WHOLE, *NEAREST, REST], 0.0)
    for event in found.events():
        names, at = [], event
        while at is not None:
            names.append(at.name)
            at = at.cpu_parent
        result[group(names)] += event.self_cpu_time_total / 1e3
    return result


def matrix_parameters(model: HybridLM) -> tuple[int, int]:
    """Parameters of the layers' linears, and of the head."""
    linear = sum(
        p.numel()
        for name, p in model.backbone.layers.named_parameters()
        if p.ndim == 2 and "conv" not in name
    )
    return linear, model.config.vocab_size * model.config.hidden_size


def rooflines(model: HybridLM, lengths: list[int], stream: float, product: float) -> dict[str, float]:
    """The roofline of each part of a bf16 step in ms, from bytes at `stream` per second or FLOPs at `product`
    per second.

    Bytes: each operand once, in its present dtype (fp32 for the residual stream, the scan's y and master
    weights; else bf16).
    """
    config, T = model.config, sum(lengths)
    linear, head = matrix_parameters(model)
    count = {kind: config.mixers.count(kind) for kind in (Mamba2, Attention, MLP)}
    D, channels = (
        config.mamba_inner_size,
        config.mamba_inner_size + 2 * config.n_groups * config.ssm_state_size,
    )
    scanned = T * count[Mamba2] * (2 * channels + 4 * config.mamba_num_heads + 4 * D)
    state_work = T * count[Mamba2] * D * config.ssm_state_size
    norm = T * ((len(config.pattern) + 1) * 16 * config.hidden_size + count[Mamba2] * 22 * D)
    pairs = (
        sum(length * length for length in lengths)
        * config.num_attention_heads
        * config.head_dim
        * count[Attention]
    )
    parameters = sum(p.numel() for p in model.parameters())

    def bound(bytes_: float = 0, flops: float = 0) -> float:
        return 1e3 * max(bytes_ / stream, flops / product)

    return {
        "projections": bound(flops=6 * linear * T),
        "loss and head": bound(flops=6 * head * T),
        "scan, forward": bound(scanned, 5 * state_work),  # decay, update, output
        "scan, backward": bound(2 * scanned, 5 * state_work + 8 * state_work),
        "conv": bound(T * count[Mamba2] * 10 * channels),
        "norms": bound(norm),
        "squared ReLU": bound(
            T * count[MLP] * 10 * config.intermediate_size if config.mlp_activation == "relu2" else 0
        ),
        "attention": bound(flops=7 * pairs),  # half of each product is masked; 2 products forward, 5 backward
        "optimizer": bound(40 * parameters),  # norm, scale, then weight, gradient and both moments
        "casts": bound(12 * linear),  # weights to bf16, their gradients back
        REST: 0.0,
    }


def rows(
    model: HybridLM, lengths: list[int], found: profile, stream: float, product: float
) -> list[dict[str, Any]]:
    """The table, longest first: part, ms, share of the step, roofline in ms."""
    times, limits = milliseconds(found), rooflines(model, lengths, stream, product)
    whole = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return [
        {
            "part": name,
            "ms": round(ms, 1),
            "share": round(ms / whole, 3),
            "roofline_ms": round(limits[name], 1),
        }
        for name, ms in ordered
    ]


def product_flops(model: HybridLM, tokens: int) -> float:
    """FLOPs of the matrix products of a step: six per parameter and token, including the head's."""
    return 6.0 * sum(matrix_parameters(model)) * tokens
