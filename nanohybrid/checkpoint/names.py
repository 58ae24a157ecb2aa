"""Tensor names on disk and in the model, whose names are the official checkpoint's.

official:      backbone.layers.7.mixer.A_log         (what HybridLM and its declaration say)
old files:     backbone.embedding.weight; in transformers' memory: model.layers.7.mixer.A_log
llama, qwen3:  model.layers.3.self_attn.q_proj.weight: one of their layers is two of ours, attention then MLP
"""

from __future__ import annotations

from nanohybrid.checkpoint.config_fields import DENSE_TYPES
from nanohybrid.checkpoint.dialects import model_type
from nanohybrid.config import HybridConfig
from nanohybrid.model.spec import param_specs

EMBEDDINGS, HEAD = "backbone.embeddings.weight", "lm_head.weight"
_WHOLE = {EMBEDDINGS: "model.embed_tokens.weight", "backbone.norm_f.weight": "model.norm.weight", HEAD: HEAD}


def disk_names(config: HybridConfig) -> dict[str, str]:
    """Our name -> the name under which the tensor is saved, in the order of the forward pass."""
    names = list(param_specs(config))
    return (
        {name: _dense(name) for name in names}
        if model_type(config) in DENSE_TYPES
        else {name: name for name in names}
    )


def model_name(disk: str, config: HybridConfig) -> str:
    """The model's name of a tensor in a file; an unknown name is returned unchanged."""
    if model_type(config) in DENSE_TYPES:
        return _from_dense(disk)
    if disk.startswith("model."):
        disk = "backbone." + disk.removeprefix("model.")
    return EMBEDDINGS if disk == "backbone.embedding.weight" else disk


def is_ignored(disk: str) -> bool:
    """Whether a tensor is known and not needed: heads that predict several tokens at once (`mtp.*`), and the
    rotary frequencies that files of 2023 store (`rotary_emb.inv_freq`).
    """
    return "mtp" in disk.split(".")[:2] or disk.endswith("rotary_emb.inv_freq")


def _dense(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, index, part, *rest = name.split(".")
    layer, is_mlp = divmod(int(index), 2)
    if part == "norm":
        rest = ["post_attention_layernorm" if is_mlp else "input_layernorm", *rest]
    else:
        rest = ["mlp" if is_mlp else "self_attn", *rest]
    return ".".join(["model", "layers", str(layer), *rest])


def _from_dense(disk: str) -> str:
    if disk.split(".")[0] in ("embed_tokens", "layers", "norm"):
        disk = f"model.{disk}"  # files of the body without its head
    whole = {theirs: ours for ours, theirs in _WHOLE.items()}
    if disk in whole:
        return whole[disk]
    parts = disk.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 5 or not parts[2].isdecimal() or len(parts[2]) > 6:
        return disk
    kinds = {
        "input_layernorm": (0, ["norm"]), "self_attn": (0, ["mixer"]),
        "post_attention_layernorm": (1, ["norm"]), "mlp": (1, ["mixer"]),
    }  # fmt: skip
    if parts[3] not in kinds:
        return disk
    offset, ours = kinds[parts[3]]
    return ".".join(["backbone", "layers", str(2 * int(parts[2]) + offset), *ours, *parts[4:]])
