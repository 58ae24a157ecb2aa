"""Quantized matrices in checkpoint files: the layout of compressed-tensors (read and write) and NVIDIA
ModelOpt's FP8 (read).

    X = the name of a linear in the file                                            `format` in config.json
    int8    X.weight int8 [N, K], X.weight_scale [N, G]                             naive-quantized
    int4    X.weight_packed int32 [N, K / 8], X.weight_scale [N, G], X.weight_shape pack-quantized
    fp8     X.weight e4m3 [N, K], X.weight_scale [N, 1]                             float-quantized
    ModelOpt's FP8: as fp8, with one X.weight_scale per matrix; X.input_scale is not used

Packed words hold eight 4-bit values, lowest bits first; on a little-endian machine these are the bytes of the
int4 codes. Only weights are quantized in written checkpoints. In checkpoints of others, scales of activations
and of the KV cache are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanohybrid.checkpoint.dialects import CONFIG
from nanohybrid.checkpoint.jsonfile import read_object
from nanohybrid.errors import CheckpointError, InputError, shown
from nanohybrid.ops.quantized import group_of

COMPRESSED_TENSORS, MODELOPT = "compressed-tensors", "modelopt"
LAYOUTS = {"int8": "naive-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}
READABLE = (*LAYOUTS.values(), "int-quantized", "mixed-precision")
PLAIN, PACKED, SCALE, SHAPE = "weight", "weight_packed", "weight_scale", "weight_shape"
UNUSED_SCALES = (
    "input_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
)  # of activations and KV caches
KEY, HF_QUANT = "quantization_config", "hf_quant_config.json"


def refuse_quantized(directory: str | Path, so: str = "use the checkpoint that it was made from") -> None:
    """Raise InputError for a quantized checkpoint, which cannot be trained, pruned or merged; `so` is the
    fix."""
    if (Path(directory) / CONFIG).is_file() and is_quantized(Path(directory)):
        raise InputError(f"{directory}: is a quantized checkpoint; {so}")


def is_quantized(directory: Path) -> bool:
    """Whether the configuration has a quantization of the weights.

    Raises CheckpointError for an unknown one.
    """
    path = directory / CONFIG
    settings = read_object(path).get(KEY)
    if (
        settings is None and (directory / HF_QUANT).is_file()
    ):  # ModelOpt's file, where config.json has no such key
        path = directory / HF_QUANT
        inner = read_object(path).get("quantization")
        settings = {**inner, "quant_method": MODELOPT} if isinstance(inner, dict) else inner
    if settings is None or settings == {}:
        return False
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: {KEY} is not an object")
    problem = _problem(settings)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    return True


def _problem(settings: Mapping[str, Any]) -> str | None:
    """The reason why a quantization cannot be read, or None."""
    method = settings.get("quant_method")
    if method == MODELOPT:
        algorithm = settings.get("quant_algo")
        return (
            None
            if algorithm == "FP8"
            else f"quant_algo is {shown(algorithm)}; of {MODELOPT} only FP8 is supported"
        )
    if method != COMPRESSED_TENSORS:
        return f"quant_method is {shown(method)}; supported are {COMPRESSED_TENSORS} and {MODELOPT} (FP8)"
    if settings.get("format") not in READABLE:
        found, known = shown(settings.get("format")), ", ".join(READABLE)
        return f"format is {found}; of {COMPRESSED_TENSORS} supported are {known}"
    groups = settings.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or not weights.get("symmetric", True):
            return f"{shown(name)}: only symmetric quantization of weights is supported, without zero points"
    return None


def quantization_config(
    formats: Mapping[str, str], widths: Mapping[str, int], plain: Iterable[str]
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    formats: format of each quantized linear, by the last part of its name. widths: inputs of each linear.
    plain: linears that are not quantized. If all have one format and group size, the target is `Linear`.
    """
    kinds: dict[tuple[str, int], list[str]] = {}
    for name, format in formats.items():
        kinds.setdefault((format, _group(format, widths[name])), []).append(name)
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(kinds) == 1 else [_pattern(name) for name in names],
            "weights": _arguments(format, group),
            "input_activations": None,
            "output_activations": None,
            "format": LAYOUTS[format],
        }
        for index, ((format, group), names) in enumerate(kinds.items())
    }
    layouts = {LAYOUTS[format] for format, _ in kinds}
    return {
        "config_groups": groups,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": [
            _pattern(name) for name in (*plain, "conv1d")
        ],  # some programs treat Mamba's convolution as a linear
        "kv_cache_scheme": None,
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
    }


def _pattern(name: str) -> str:
    """A target that matches a linear by its name, for any path before it."""
    return name if name == "lm_head" else f"re:.*[.]{name}$"


def _group(format: str, inputs: int) -> int:
    """Weights that share a scale; 0 for a whole row."""
    group = group_of(format, inputs)
    return 0 if format != "int4" and group == inputs else group


def _arguments(format: str, group: int) -> dict[str, Any]:
    return {
        "num_bits": 4 if format == "int4" else 8,
        "type": "float" if format == "fp8" else "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
