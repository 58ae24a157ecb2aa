"""Where a training step's time goes: torch.profiler's events by what they are part of, each beside the least
it could take.

T tokens · E hidden width · F FFN width · C conv channels · D Mamba's inner width · H heads · P head dimension
· N state size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanohybrid.model import HybridLM
from nanohybrid.model.mixers import MLP, Attention, Mamba2

if TYPE_CHECKING:
    from torch.profiler import profile

# What an event is, by the name of itself or of what called it: the first row with a match anywhere above it.
WHOLE = {
    "loss and head": ("_Summed", "_PerToken"),
    "scan, backward": ("_ScanBackward", "ChunkBackward"),
    "scan, forward": ("_Scan", "Chunk"),
    "conv": ("_Conv", "_Shifted"),
    "norms": ("_Norm", "rms_norm", "RmsNorm"),
    "squared ReLU": ("_SquaredReLU",),
    "attention": ("scaled_dot_product",),
    "optimizer": ("Optimizer.", "clip", "linalg_vector_norm"),
}
# Else by the nearest.
NEAREST = {
    "casts": ("aten::to", "_to_copy", "ToCopyBackward"),
    "projections": ("aten::linear", "aten::mm", "MmBackward", "aten::addmm"),
}
REST = "rest"


def group(names: list[str]) -> str:
    """The group of an event, from its own name and those of its callers, nearest first."""
    for name, marks in WHOLE.items():
        if any(mark in one for one in names for mark in marks):
            return name
    for one in names:
        for name, marks in NEAREST.items():
            if any(mark in one for mark in marks):
                return name
    return REST


def milliseconds(found: profile) -> dict[str, float]:
    """Each group's time: what its events took themselves, without what they called."""
    result = dict.fromkeys([*WHOLE, *NEAREST, REST], 0.0)
    for event in found.events():
        names, at = [], event
        while at is not None:
            names.append(at.name)
            at = at.cpu_parent
        result[group(names)] += event.self_cpu_time_total / 1e3
    return result


def matrix_parameters(model: HybridLM) -> tuple[int, int]:
    """Parameters of the layers' linears, and of the head, which multiply each token once."""
    linear = sum(
        p.numel()
        for name, p in model.backbone.layers.named_parameters()
        if p.ndim == 2 and "conv" not in name
    )
    return linear, model.config.vocab_size * model.config.hidden_size


def floors(model: HybridLM, lengths: list[int], stream: float, product: float) -> dict[str, float]:
    """The least that each group of a bf16 step could take, in ms, by bytes at `stream` a second or FLOPs at
    `product` a second.

    Bytes: each operand once, as it is now (fp32 residual stream, scanned y and master weights; everything
    else bf16)."""
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

    def least(bytes_: float = 0, flops: float = 0) -> float:
        return 1e3 * max(bytes_ / stream, flops / product)

    return {
        "projections": least(flops=6 * linear * T),
        "loss and head": least(flops=6 * head * T),
        "scan, forward": least(scanned, 5 * state_work),  # decay, feed, read
        "scan, backward": least(2 * scanned, 5 * state_work + 8 * state_work),
        "conv": least(T * count[Mamba2] * 10 * channels),
        "norms": least(norm),
        "squared ReLU": least(
            T * count[MLP] * 10 * config.intermediate_size if config.mlp_activation == "relu2" else 0
        ),
        "attention": least(
            flops=7 * pairs
        ),  # half of each product is masked: 2 products forwards, 5 backwards
        "optimizer": least(40 * parameters),  # norm, scale, then weight, gradient and both moments
        "casts": least(12 * linear),  # weights to bf16, their gradients back
        REST: 0.0,
    }


def rows(
    model: HybridLM, lengths: list[int], found: profile, stream: float, product: float
) -> list[dict[str, Any]]:
    """The table, longest first: group, ms, share of the step, floor in ms."""
    times, least = milliseconds(found), floors(model, lengths, stream, product)
    whole = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return [
        {"part": name, "ms": round(ms, 1), "share": round(ms / whole, 3), "floor_ms": round(least[name], 1)}
        for name, ms in ordered
    ]


def product_flops(model: HybridLM, tokens: int) -> float:
    """Of the matrix products of a step: six a parameter and token, the head's among them."""
    return 6.0 * sum(matrix_parameters(model)) * tokens
