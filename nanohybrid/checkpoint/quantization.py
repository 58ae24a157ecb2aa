"""The quantization that a checkpoint's configuration declares: read, checked and written.

The matrices themselves are in quantized/.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanohybrid.checkpoint.dialects import CONFIG
from nanohybrid.checkpoint.jsonfile import read_object
from nanohybrid.checkpoint.quantized.written import LAYOUTS
from nanohybrid.errors import CheckpointError, InputError, shown
from nanohybrid.ops.quantized import group_of

COMPRESSED_TENSORS, MODELOPT = "compressed-tensors", "modelopt"
READABLE = ("pack-quantized", "naive-quantized", "int-quantized", "float-quantized", "mixed-precision")
UNUSED_SCALES = (
    "input_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
)  # of activations and KV caches
KEY, HF_QUANT = "quantization_config", "hf_quant_config.json"
HEAD = "lm_head"


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
    formats: Mapping[str, str],
    widths: Mapping[str, int],
    plain: Iterable[str],
    groups: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    formats: format of each quantized linear, by its name in the files (`backbone.layers.0.mixer.in_proj`) or,
    where all linears of this name are alike, by the last part (`in_proj`). widths: inputs of each linear.
    plain: linears that are not quantized. groups: weights that share a scale, where that is not the format's
    own.

    Where all have one format and group size the target is the class `Linear`; a quantized head is named
    besides, because vLLM's head is no `Linear`. vLLM reads the projections of queries, keys and values as
    one linear, and the gate of an MLP with its up projection: parts of these need the same format.
    """
    kinds = {
        name: (format, _group(format, widths[name], (groups or {}).get(name)))
        for name, format in formats.items()
    }
    every = {**dict.fromkeys(plain, None), **kinds}
    written = {}
    for index, kind in enumerate(dict.fromkeys(kinds.values())):
        format, group = kind
        targets = _targets([name for name in kinds if kinds[name] == kind], every)
        if len(set(kinds.values())) == 1:
            targets = ["Linear", *(target for target in targets if target == HEAD)]
        written[f"group_{index}"] = {
            "targets": targets,
            "weights": _arguments(format, group),
            "input_activations": None,
            "output_activations": None,
            "format": LAYOUTS[format],
        }
    layouts = {LAYOUTS[format] for format, _ in kinds.values()}
    left = [name for name in every if name not in kinds]
    return {
        "config_groups": written,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": [*_targets(left, every), "re:.*[.]conv1d$"],  # some programs take Mamba's for a linear
        "kv_cache_scheme": None,
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
    }


def _targets(names: Iterable[str], every: Mapping[str, object]) -> list[str]:
    """Patterns that match these linears by name, for any path before it, and no other linear of `every`.

    One pattern for all linears of a name that are alike, else one for each.
    """
    result: dict[str, None] = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        alike = {every[other] for other in every if other.rpartition(".")[2] == leaf}
        path = name[name.find("layers.") :] if len(alike) > 1 and "layers." in name else leaf
        result[HEAD if name == HEAD else f"re:.*[.]{path.replace('.', '[.]')}$"] = None
    return list(result)


def _group(format: str, inputs: int, given: int | None) -> int:
    """Weights that share a scale; 0 for a whole row."""
    group = given or group_of(format, inputs)
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
