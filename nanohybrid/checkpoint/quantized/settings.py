"""What the configuration of a checkpoint says about its quantization, and which quantizations are read.

`quantization_config` in config.json, ModelOpt's hf_quant_config.json where that has no such key, or the
quantize_config.json of old GPTQ files. Most of a layout is seen from the tensors themselves; what cannot be
seen there (sizes of blocks, offsets of zero points) is in `Settings`.

Scales of activations and of KV caches are ignored: products run in the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanohybrid.checkpoint.jsonfile import read_object
from nanohybrid.errors import CheckpointError, shown

KEY, MLX_KEY, CONFIG = "quantization_config", "quantization", "config.json"
HF_QUANT, OLD_GPTQ = "hf_quant_config.json", "quantize_config.json"
COMPRESSED_TENSORS, MODELOPT, FP8, GPTQ, AWQ = "compressed-tensors", "modelopt", "fp8", "gptq", "awq"
METHODS = (COMPRESSED_TENSORS, MODELOPT, FP8, GPTQ, AWQ)
FORMATS = (
    "pack-quantized",
    "float-quantized",
    "naive-quantized",
    "int-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
    "dense",
)
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "MIXED_PRECISION")
BLOCK = (128, 128)  # of ModelOpt's FP8_PB_WO, whose files do not say it
INSTEAD = "take the checkpoint that it was made from, and quantize that (`--quantize`)"


@dataclass(frozen=True)
class Settings:
    """What the tensors of a quantized checkpoint do not show.

    block: rows and columns that share a scale, in FP8 by blocks. bits, symmetric, zero_offset: of GPTQ and
    AWQ (quantized/columns.py).
    """

    method: str
    block: tuple[int, int] | None = None
    bits: int = 4
    symmetric: bool = False
    zero_offset: int = 1


def read_settings(directory: Path) -> Settings | None:
    """The quantization of a checkpoint directory; None where the weights are not quantized.

    Raises CheckpointError, naming the method and the way out, for one that is not read.
    """
    path, found = _find(directory)
    if found is None or found == {}:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {KEY} is not an object")
    try:
        return _settings(found)
    except _NotRead as error:
        raise CheckpointError(f"{path}: {error}") from None


class _NotRead(Exception):
    """The reason why a quantization is not read, with the way out."""


def _find(directory: Path) -> tuple[Path, Any]:
    path = directory / CONFIG
    config = read_object(path)
    if config.get(KEY) is not None:
        return path, config[KEY]
    if isinstance(config.get(MLX_KEY), dict):
        raise CheckpointError(f"{path}: the quantization of MLX is not read; {INSTEAD}")
    if (directory / HF_QUANT).is_file():
        inner = read_object(directory / HF_QUANT).get("quantization")
        return directory / HF_QUANT, {**inner, "quant_method": MODELOPT} if isinstance(inner, dict) else inner
    if (directory / OLD_GPTQ).is_file():
        return directory / OLD_GPTQ, {"quant_method": GPTQ, **read_object(directory / OLD_GPTQ)}
    return path, None


def _settings(found: Mapping[str, Any]) -> Settings:
    method = found.get("quant_method")
    if isinstance(method, str) and method.startswith(f"{MODELOPT}_"):  # modelopt_fp4, modelopt_mixed
        method = MODELOPT
    readers = {
        COMPRESSED_TENSORS: _compressed_tensors,
        MODELOPT: _modelopt,
        FP8: _fp8,
        GPTQ: _gptq,
        AWQ: _awq,
    }
    if method not in readers:
        also = " (of MLX)" if method is None and {"group_size", "bits"} <= found.keys() else ""
        raise _NotRead(f"quant_method is {shown(method)}{also}; read are {', '.join(METHODS)}. {_way_out()}")
    return readers[method](found)


def _way_out() -> str:
    return INSTEAD[0].upper() + INSTEAD[1:]


def _compressed_tensors(found: Mapping[str, Any]) -> Settings:
    _known("format", found.get("format"), FORMATS, COMPRESSED_TENSORS)
    transforms = found.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise _NotRead(f"transform_config: rotations of weights and activations are not read. {_way_out()}")
    blocks: set[tuple[int, int]] = set()
    groups = found.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else ()
        if weights is None:  # of activations or a KV cache only
            continue
        if not isinstance(weights, dict):
            raise _NotRead(f"{shown(name)}: says nothing of the weights. {_way_out()}")
        if group.get("format") is not None:
            _known(f"{shown(name)}: format", group["format"], FORMATS, COMPRESSED_TENSORS)
        kind = (weights.get("type", "int"), weights.get("num_bits", 8))
        if kind not in (("int", 8), ("int", 4), ("float", 8), ("float", 4)):
            raise _NotRead(
                f"{shown(name)}: weights are {kind[0]} of {kind[1]} bits; read are 8 and 4. {_way_out()}"
            )
        if weights.get("actorder") in ("group", "dynamic", True):
            raise _NotRead(
                f"{shown(name)}: actorder is {shown(weights['actorder'])} (g_idx): columns in the order of "
                f"their activations are not read. {_way_out()}"
            )
        if weights.get("strategy") == "block":
            blocks.add(_block(f"{shown(name)}: block_structure", weights.get("block_structure")))
    if len(blocks) > 1:
        raise _NotRead(
            f"config_groups: blocks of several sizes, {sorted(blocks)}, are not read. {_way_out()}"
        )
    return Settings(COMPRESSED_TENSORS, block=blocks.pop() if blocks else None)


def _modelopt(found: Mapping[str, Any]) -> Settings:
    algorithm = found.get("quant_algo")
    _known("quant_algo", algorithm, ALGORITHMS, MODELOPT)
    layers = found.get("quantized_layers")
    inner = (
        [one.get("quant_algo") for one in layers.values() if isinstance(one, dict)]
        if isinstance(layers, dict)
        else []
    )
    for one in inner:
        _known("quantized_layers: quant_algo", one, ALGORITHMS, MODELOPT)
    return Settings(MODELOPT, block=BLOCK if "FP8_PB_WO" in (algorithm, *inner) else None)


def _fp8(found: Mapping[str, Any]) -> Settings:
    if found.get("fmt", "e4m3") != "e4m3":
        raise _NotRead(f"fmt is {shown(found['fmt'])}; of {FP8} only e4m3 is read. {_way_out()}")
    block = found.get("weight_block_size")
    return Settings(FP8, block=None if block is None else _block("weight_block_size", block))


def _gptq(found: Mapping[str, Any]) -> Settings:
    if found.get("desc_act"):
        raise _NotRead(
            f"desc_act is true (g_idx): columns in the order of their activations are not read. {_way_out()}"
        )
    bits = found.get("bits")
    if bits not in (4, 8):
        raise _NotRead(f"bits is {shown(bits)}; of {GPTQ} 4 and 8 are read. {_way_out()}")
    form = found.get("checkpoint_format", "gptq")
    _known("checkpoint_format", form, ("gptq", "gptq_v2"), GPTQ)
    return Settings(GPTQ, None, bits, bool(found.get("sym")), 1 if form == "gptq" else 0)


def _awq(found: Mapping[str, Any]) -> Settings:
    version = str(found.get("version", "gemm")).lower()
    bits = found.get("bits", found.get("w_bit"))
    if version != "gemm" or bits != 4:
        raise _NotRead(
            f"version is {shown(version)} and bits {shown(bits)}; of {AWQ} gemm with 4 bits is read. "
            f"{_way_out()}"
        )
    return Settings(AWQ, None, 4, symmetric=False)


def _known(key: str, value: object, known: tuple[str, ...], method: str) -> None:
    if value not in known:
        raise _NotRead(f"{key} is {shown(value)}; of {method} {', '.join(known)} are read. {_way_out()}")


def _block(key: str, value: object) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(one) is int and one > 0 for one in value):
        return value[0], value[1]
    raise _NotRead(f"{key} is {shown(value)}: a block is two positive numbers, rows and columns")
