"""The quantization that is written to config.json, and the refusal of quantized checkpoints.

What other programs write is read in quantized/.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanohybrid.checkpoint.quantized.settings import COMPRESSED_TENSORS, CONFIG, KEY, read_settings
from nanohybrid.checkpoint.quantized.written import LAYOUTS
from nanohybrid.errors import InputError
from nanohybrid.ops.quantized import group_of

__all__ = ["KEY", "quantization_config", "refuse_quantized"]

HEAD = "lm_head"


def refuse_quantized(directory: str | Path, so: str = "use the checkpoint that it was made from") -> None:
    """Raise InputError for a quantized checkpoint, which cannot be trained, pruned or merged; `so` is the
    fix."""
    if (Path(directory) / CONFIG).is_file() and read_settings(Path(directory)) is not None:
        raise InputError(f"{directory}: is a quantized checkpoint; {so}")


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
