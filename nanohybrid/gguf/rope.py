"""The RoPE scaling of a GGUF file as the `rope_scaling` of a config.json.

Linear and YaRN scaling stand in the metadata. Llama 3's stands there as its result only: the tensor
rope_freqs.weight has one divisor for each frequency. Its parameters are found by trying the known contexts,
and those that the divisors tell.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nanohybrid.errors import CheckpointError, shown
from nanohybrid.gguf.header import GgufFile

FREQUENCIES = "rope_freqs.weight"
LOW, HIGH = 1.0, 4.0  # of every published Llama 3 model
ORIGINAL = (8192, 4096, 2048, 16384, 32768)


def rope_scaling(file: GgufFile, kind: str, theta: float, width: int) -> dict[str, Any] | None:
    """The scaling, or None. Raises CheckpointError for one that is unknown.

    theta: the base of the frequencies. width: of a head.
    """
    prefix = f"{kind}.rope.scaling"
    factor = file.number(f"{prefix}.factor", file.number(f"{kind}.rope.scale_linear", 0.0))
    named = file.text(f"{prefix}.type") if f"{prefix}.type" in file.metadata else "linear"
    if FREQUENCIES in file.tensors:
        return _llama3(file, theta, width)
    if named == "none" or factor in (0.0, 1.0):
        return None
    if named not in ("linear", "yarn"):
        raise file.wrong(f"{prefix}.type is {shown(named)}: known are none, linear and yarn")
    result: dict[str, Any] = {"rope_type": named, "factor": factor}
    if named == "yarn":
        key = f"{prefix}.original_context_length"
        result["original_max_position_embeddings"] = file.whole(key)
        for name, own in {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}.items():
            if f"{prefix}.{own}" in file.metadata:
                result[name] = file.number(f"{prefix}.{own}")
        for own in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
            if file.number(f"{prefix}.{own}", 1.0) != 1.0:
                raise file.wrong(f"{prefix}.{own} is {file.number(f'{prefix}.{own}')}: only 1 is supported")
    return result


def _llama3(file: GgufFile, theta: float, width: int) -> dict[str, Any]:
    tensor = file.tensors[FREQUENCIES]
    if tensor.kind != "F32" or tensor.shape != (width // 2,):
        raise file.wrong(f"{FREQUENCIES} is {tensor.kind} {list(tensor.shape)}, expected F32 [{width // 2}]")
    try:
        with open(tensor.path, "rb") as stream:
            stream.seek(tensor.begin)
            found = np.frombuffer(stream.read(tensor.end - tensor.begin), dtype="<f4")
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: {FREQUENCIES}: cannot be read ({error.strerror})") from None
    factor = float(found.max(initial=0.0)) if len(found) == width // 2 else 0.0
    for original in (*ORIGINAL, *_contexts(found, theta, width, factor)):
        if np.allclose(found, divisors(theta, width, factor, original), rtol=1e-5):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": HIGH,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    raise file.wrong(f"{FREQUENCIES} is not the scaling of Llama 3, the only one of this form that is known")


def _contexts(found: np.ndarray[Any, Any], theta: float, width: int, factor: float) -> list[int]:
    """The original context that each interpolated divisor tells."""
    result = set()
    for index, divisor in enumerate(found.tolist()):
        if 1 < divisor < factor:
            smooth = (1 / divisor - 1 / factor) / (1 - 1 / factor)
            wavelength = 2 * math.pi * theta ** (2 * index / width)
            result.add(round((smooth * (HIGH - LOW) + LOW) * wavelength))
    return sorted(result)


def divisors(theta: float, width: int, factor: float, original: int) -> list[float]:
    """Llama 3's divisor of each frequency: 1 for short wavelengths, `factor` for long ones, between them
    interpolated. [width / 2]
    """
    result = []
    for index in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (index / width)
        turns = original / wavelength
        smooth = min(max((turns - LOW) / (HIGH - LOW), 0.0), 1.0)
        result.append(1 / ((1 - smooth) / factor + smooth) if factor else math.nan)
    return result
