"""How quantized matrices lie on the disk: compressed-tensors' layout out and in, NVIDIA ModelOpt's FP8 in.

    X = a linear's name on the disk                                                 `format` in config.json
    int8    X.weight int8 [N, K], X.weight_scale [N, G]                             naive-quantized
    int4    X.weight_packed int32 [N, K / 8], X.weight_scale [N, G], X.weight_shape pack-quantized
    fp8     X.weight e4m3 [N, K], X.weight_scale [N, 1]                             float-quantized
    ModelOpt's FP8: as fp8 with one X.weight_scale for all of it; X.input_scale is not used, our activations stay wide

Packed words hold eight values of four bits, the lowest bits first: on a little-endian machine the very bytes of our int4 codes.
Only weights are quantized in what is written. Of what is read, scales of activations and of a KV cache are left aside.
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
ASIDE = (
    "input_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
)  # of activations and caches: not used here
KEY, HF_QUANT = "quantization_config", "hf_quant_config.json"


def refuse_quantized(directory: str | Path, so: str = "take the one that it was made from") -> None:
    """Raise InputError where a checkpoint is quantized, for what cannot be done with one: training, pruning, merging."""
    if (Path(directory) / CONFIG).is_file() and is_quantized(Path(directory)):
        raise InputError(f"{directory}: is a quantized checkpoint: {so}")


def is_quantized(directory: Path) -> bool:
    """Whether the configuration says that weights are quantized, in a way that is known. Raises CheckpointError where it is not."""
    path = directory / CONFIG
    said = read_object(path).get(KEY)
    if (
        said is None and (directory / HF_QUANT).is_file()
    ):  # ModelOpt's own file, beside a config.json without the key
        path = directory / HF_QUANT
        inner = read_object(path).get("quantization")
        said = {**inner, "quant_method": MODELOPT} if isinstance(inner, dict) else inner
    if said is None:
        return False
    if not isinstance(said, dict):
        raise CheckpointError(f"{path}: {KEY} is not an object")
    problem = _problem(said)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    return True


def _problem(said: Mapping[str, Any]) -> str | None:
    """What of a quantization is not known here, and what is."""
    method = said.get("quant_method")
    if method == MODELOPT:
        algorithm = said.get("quant_algo")
        return (
            None
            if algorithm == "FP8"
            else f"quant_algo is {shown(algorithm)}: of {MODELOPT} only FP8 is known"
        )
    if method != COMPRESSED_TENSORS:
        return f"quant_method is {shown(method)}: known are {COMPRESSED_TENSORS} and {MODELOPT} (FP8)"
    if said.get("format") not in READABLE:
        return f"the format is {shown(said.get('format'))}: of {COMPRESSED_TENSORS} known are {', '.join(READABLE)}"
    groups = said.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or not weights.get("symmetric", True):
            return (
                f"{shown(name)}: only weights that are quantized symmetrically are known, without zero points"
            )
    return None


def described(formats: Mapping[str, str], widths: Mapping[str, int], plain: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of linears by the last part of their names, which is what they are called everywhere: the format of
    each and the width of its rows; `plain` stay as they are. Where all are of one kind it speaks of all linears at once."""
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
        ],  # Mamba's convolution is a linear layer to some programs
        "kv_cache_scheme": None,
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
    }


def _pattern(name: str) -> str:
    """A target that a linear is found by, whatever the program calls the path to it."""
    return name if name == "lm_head" else f"re:.*[.]{name}$"


def _group(format: str, inputs: int) -> int:
    """Weights that share a scale; 0 where it is all of a row."""
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
