"""Scalings of rotary positions for llama.cpp.

linear, yarn   keys of the file
llama3         the tensor rope_freqs.weight: the divisor of each frequency; `llama` reads it, `qwen3` does not

P dimension of a head.
"""

from __future__ import annotations

from torch import Tensor

from nanohybrid.checkpoint.llama_cpp import architecture
from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.gguf.rope import FREQUENCIES
from nanohybrid.model.mixers.rope import RopeScaling, inverse_frequencies

__all__ = ["FREQUENCIES", "check_scaling", "divisors", "scaling_keys"]


def check_scaling(config: HybridConfig) -> None:
    """Raise InputError where llama.cpp would compute other positions than the model."""
    scaling = config.rope_scaling
    if scaling is None:
        return
    kind = architecture(config)
    if scaling.rope_type == "llama3" and kind != "llama":
        raise InputError(f"rope_scaling is llama3; llama.cpp knows it for llama alone, and this is {kind}")
    usual = RopeScaling(rope_type="yarn", factor=scaling.factor, original_max_position_embeddings=1)
    if scaling.rope_type == "yarn" and scaling.attention_scale != usual.attention_scale:
        raise InputError(
            f"rope_scaling multiplies cos and sin by {scaling.attention_scale:g}; llama.cpp does it by "
            f"{usual.attention_scale:g} for this factor"
        )
    if not scaling.truncate:
        raise InputError("truncate of rope_scaling is false; llama.cpp rounds the bounds of yarn")
    if scaling.rope_type == "yarn" and (scaling.fast, scaling.slow) != (usual.fast, usual.slow):
        raise InputError(
            f"beta_fast and beta_slow of rope_scaling are {scaling.fast:g} and {scaling.slow:g}; llama.cpp "
            f"takes them from no file, and computes with {usual.fast:g} and {usual.slow:g}"
        )


def scaling_keys(config: HybridConfig) -> dict[str, str | float | int]:
    """The keys of a scaling, without the prefix of the architecture."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "llama3":
        return {}
    keys: dict[str, str | float | int] = {
        "rope.scaling.type": scaling.rope_type, "rope.scaling.factor": float(scaling.factor),
    }  # fmt: skip
    if scaling.rope_type == "yarn":
        assert scaling.original_max_position_embeddings is not None
        keys["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    return keys


def divisors(config: HybridConfig) -> Tensor | None:
    """What llama.cpp divides each frequency by, [P/2] in fp32; None where no tensor says it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "llama3" or config.rope_theta is None:
        return None
    plain = inverse_frequencies(config.head_dim, config.rope_theta)
    return plain / inverse_frequencies(config.head_dim, config.rope_theta, scaling)
