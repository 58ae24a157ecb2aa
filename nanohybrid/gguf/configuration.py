"""The metadata of a GGUF file as the object of a `config.json`.

nemotron_h   layers by two lists: key/value heads (attention), MLP widths; where both are 0, Mamba-2
qwen3        attention and MLP in every block
llama        the same, without norms of queries and keys; RoPE scaling by keys or by rope_freqs.weight
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nanohybrid.errors import shown
from nanohybrid.gguf.header import GgufFile
from nanohybrid.gguf.rope import rope_scaling

NEMOTRON, QWEN, LLAMA = "nemotron_h", "qwen3", "llama"
ARCHITECTURES = (NEMOTRON, QWEN, LLAMA)
MOST_BLOCKS = 10_000
_REFUSED = {
    "expert_count": "a mixture of experts",
    "nextn_predict_layers": "layers that predict several tokens at once",
}
TOKEN_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}


def config_object(file: GgufFile) -> dict[str, Any]:
    """The object of a config.json for the model in a file.

    Raises CheckpointError for an unknown architecture, and for missing or contradictory keys.
    """
    kind = file.architecture
    if kind not in ARCHITECTURES:
        raise file.wrong(f"its architecture is {shown(kind)}; known are {', '.join(ARCHITECTURES)}")
    for key, what in _REFUSED.items():
        if file.whole(f"{kind}.{key}", 0):
            raise file.wrong(f"{kind}.{key} is {file.whole(f'{kind}.{key}')}: {what} is not supported")
    return _hybrid(file) if kind == NEMOTRON else _dense(file, kind)


def _common(file: GgufFile, kind: str) -> dict[str, Any]:
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None:
        raise file.wrong("token_embd.weight is missing")
    result = {
        "model_type": kind, "vocab_size": embeddings.shape[0],
        "hidden_size": file.whole(f"{kind}.embedding_length"),
        "max_position_embeddings": file.whole(f"{kind}.context_length"),
    }  # fmt: skip
    for name in TOKEN_IDS:
        found = token_id(file, name)
        if found is not None:
            result[name] = found
    return result


def token_id(file: GgufFile, name: str) -> int | None:
    """The id of bos_token_id and the like; None where the file has none, or one beyond its vocabulary."""
    key = f"tokenizer.ggml.{TOKEN_IDS.get(name, name)}"
    found = file.whole(key) if key in file.metadata else None
    return found if found is not None and found < file.tensors["token_embd.weight"].shape[0] else None


def _heads(file: GgufFile, kind: str, hidden: int, heads: int) -> int:
    """The width of a head."""
    width = file.whole(f"{kind}.attention.key_length", hidden // heads if heads else 0)
    if file.whole(f"{kind}.attention.value_length", width) != width:
        raise file.wrong(f"{kind}.attention.key_length and value_length differ, which is not supported")
    return width


def _dense(file: GgufFile, kind: str) -> dict[str, Any]:
    result = _common(file, kind)
    blocks = _block_count(file, kind)
    heads = _uniform(file, f"{kind}.attention.head_count")
    width = _heads(file, kind, result["hidden_size"], heads)
    rotated = file.whole(f"{kind}.rope.dimension_count", width)
    if rotated != width:
        raise file.wrong(
            f"{kind}.rope.dimension_count is {rotated} of a head's {width}: partial RoPE is not supported"
        )
    kv_key = f"{kind}.attention.head_count_kv"
    theta = single(file.number(f"{kind}.rope.freq_base", 10_000.0))
    return result | {
        "num_hidden_layers": blocks, "num_attention_heads": heads, "head_dim": width,
        "num_key_value_heads": _uniform(file, kv_key) if kv_key in file.metadata else heads,
        "intermediate_size": _uniform(file, f"{kind}.feed_forward_length"),
        "rms_norm_eps": single(file.number(f"{kind}.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta, "rope_scaling": rope_scaling(file, kind, theta, width), "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }  # fmt: skip


def _hybrid(file: GgufFile) -> dict[str, Any]:
    kind = NEMOTRON
    result = _common(file, kind)
    kv_heads, widths = (
        _by_block(file, f"{kind}.{key}") for key in ("attention.head_count_kv", "feed_forward_length")
    )
    blocks = [
        "attention" if heads else "mlp" if width else "mamba"
        for heads, width in zip(kv_heads, widths, strict=True)
    ]
    both = next((number for number, pair in enumerate(zip(kv_heads, widths, strict=True)) if all(pair)), None)
    if both is not None:
        raise file.wrong(f"block {both} has key/value heads and an MLP, which is not supported")
    heads = max(_numbers(file, f"{kind}.attention.head_count"))
    inner, mamba_heads = (
        file.whole(f"{kind}.ssm.inner_size", 0),
        file.whole(f"{kind}.ssm.time_step_rank", 0),
    )
    if "mamba" in blocks and (not mamba_heads or not inner or inner % mamba_heads):
        raise file.wrong(f"{kind}.ssm.inner_size is {inner}, and no multiple of the {mamba_heads} heads")
    result |= {
        "layers_block_type": blocks, "num_hidden_layers": len(blocks), "num_attention_heads": heads,
        "num_key_value_heads": _one(file, f"{kind}.attention.head_count_kv", kv_heads),
        "head_dim": _heads(file, kind, result["hidden_size"], heads),
        "intermediate_size": _one(file, f"{kind}.feed_forward_length", widths) or None,
        "layer_norm_epsilon": single(file.number(f"{kind}.attention.layer_norm_rms_epsilon")),
        "tied_head": "output.weight" not in file.tensors,
    }  # fmt: skip
    if "mamba" in blocks:
        result |= {
            "mamba_num_heads": mamba_heads, "mamba_head_dim": inner // mamba_heads,
            "n_groups": file.whole(f"{kind}.ssm.group_count"),
            "ssm_state_size": file.whole(f"{kind}.ssm.state_size"),
            "conv_kernel": file.whole(f"{kind}.ssm.conv_kernel"),
        }  # fmt: skip
    return result


def _block_count(file: GgufFile, kind: str) -> int:
    count = file.whole(f"{kind}.block_count")
    if not 1 <= count <= MOST_BLOCKS:
        raise file.wrong(f"{kind}.block_count is {count:,}: it must be from 1 to {MOST_BLOCKS:,}")
    return count


def _numbers(file: GgufFile, key: str) -> list[int]:
    """A whole number, or an array with one for each block."""
    if isinstance(file.metadata.get(key), np.ndarray):
        found = [int(number) for number in file.wholes(key)]
        if not found or len(found) > MOST_BLOCKS or min(found) < 0:
            raise file.wrong(f"{key} has {len(found):,} entries, and must have one for each block")
        return found
    return [file.whole(key)]


def _by_block(file: GgufFile, key: str) -> list[int]:
    blocks, found = _block_count(file, NEMOTRON), _numbers(file, key)
    if len(found) not in (1, blocks):
        raise file.wrong(f"{key} has {len(found):,} entries for {blocks:,} blocks")
    return found * blocks if len(found) < blocks else found


def _one(file: GgufFile, key: str, found: list[int]) -> int:
    """The only number but 0 in a list; 0 where there is none."""
    used = sorted(set(found) - {0})
    if len(used) > 1:
        raise file.wrong(f"{key} has {used[0]} and {used[1]}: layers of different sizes are not supported")
    return used[0] if used else 0


def _uniform(file: GgufFile, key: str) -> int:
    return _one(file, key, _numbers(file, key))


def single(value: float) -> float:
    """The shortest decimal number of an fp32 value: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
