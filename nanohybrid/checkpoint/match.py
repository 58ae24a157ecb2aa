"""Checks that the files of a checkpoint have exactly the tensors of the model, with their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from nanohybrid.checkpoint.header import FLOATS, Entry
from nanohybrid.checkpoint.names import EMBEDDINGS, HEAD, is_ignored, model_name
from nanohybrid.checkpoint.quantization import UNUSED_SCALES
from nanohybrid.checkpoint.quantized.written import PACKED, PLAIN, SCALE, SHAPE
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError
from nanohybrid.model.quantized import quantizable
from nanohybrid.model.spec import ParamSpec, param_specs
from nanohybrid.ops.quantized import group_of, holds

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix in the files: codes and scales, and the tensors that say more about them."""

    format: str
    shape: tuple[int, int]  # of the matrix, [out, in]
    codes: Entry
    scales: Entry
    others: tuple[Entry, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(entry.end - entry.begin for entry in (self.codes, self.scales, *self.others))


@dataclass(frozen=True)
class Matched:
    """The tensors by the model's names; `head_copy` is a stored copy of a tied head."""

    plain: dict[str, Entry]
    quantized: dict[str, Quantized]
    head_copy: Entry | None


def match(directory: Path, found: dict[str, Entry], config: HybridConfig, quantized: bool) -> Matched:
    """Match the tensors of the files with those of the model. quantized: whether config.json has a
    quantization.

    Raises CheckpointError, naming file and tensor, for missing, additional or duplicate tensors, and for
    wrong types or shapes.
    """
    wanted = param_specs(config)
    named: dict[str, Entry] = {}
    for disk, entry in found.items():
        name = model_name(disk, config)
        if name in named:
            raise CheckpointError(
                f"{entry.path}: {disk}: is the same tensor as {named[name].name}; remove one of them"
            )
        named[name] = entry
    matrices = _matrices(named, config) if quantized else {}
    plain = {name: named.pop(name) for name in wanted if name in named}
    copy = named.pop(HEAD, None) if config.tie_word_embeddings else None
    extra = [entry for entry in named.values() if not is_ignored(entry.name)]
    for name, declared in wanted.items():
        if name not in plain and name not in matrices:
            hint = f", and {extra[0].name} is not a tensor of this model" if extra else ""
            raise CheckpointError(f"{_blame(found, directory)}: {name}: is missing{hint}")
        if name in plain:
            _check(plain[name], declared)
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{extra[0].path}: {extra[0].name}{more}: is not a tensor of the model in config.json"
        )
    if copy is not None:
        _check(copy, wanted[EMBEDDINGS])
    return Matched(plain, matrices, copy)


def _matrices(named: dict[str, Entry], config: HybridConfig) -> dict[str, Quantized]:
    """Remove the tensors of quantized matrices from `named`, and return the matrices."""
    found = {}
    for name, shape in quantizable(config).items():
        owner = name.removesuffix(PLAIN)
        codes = named.get(owner + PACKED) or named.get(name)
        if codes is not None and codes.dtype not in FLOATS:
            scales = named.pop(owner + SCALE, None)
            said = named.pop(owner + SHAPE, None)
            found[name] = replace(_quantized(codes, scales, shape), others=() if said is None else (said,))
            del named[owner + PACKED if codes is named.get(owner + PACKED) else name]
    for name in [name for name in named if name.rpartition(".")[2] in UNUSED_SCALES]:
        del named[name]
    return found


def _quantized(codes: Entry, scales: Entry | None, shape: tuple[int, int]) -> Quantized:
    """One quantized matrix. Raises CheckpointError for an unknown format or shapes that do not fit."""

    def wrong(entry: Entry, what: str) -> CheckpointError:
        return CheckpointError(f"{entry.path}: {entry.name}: {what}")

    outputs, inputs = shape
    known = {"I8": ("int8", inputs), "F8_E4M3": ("fp8", inputs)}
    if codes.dtype == "I32" and codes.shape == (outputs, -(-inputs // 4)):
        known["I32"] = ("int8", -(-inputs // 4))
    elif codes.dtype == "I32" and inputs % 8 == 0:
        known["I32"] = ("int4", inputs // 8)
    if codes.dtype not in known:
        raise wrong(
            codes,
            f"is {codes.dtype} {list(codes.shape)}, which is no known format of a quantized [{outputs}, "
            f"{inputs}]",
        )
    format, width = known[codes.dtype]
    if codes.shape != (outputs, width):
        raise wrong(
            codes,
            f"is {list(codes.shape)}, but config.json says {[outputs, width]}; was this checkpoint pruned?",
        )
    if scales is None:
        raise wrong(codes, f"has no {SCALE}")
    count, least = prod(scales.shape), group_of(format, inputs)
    per_row = 1 if count == 1 else count // outputs
    fits = (
        scales.shape in ((), (1,), (1, 1), (outputs,), (outputs, per_row))
        and per_row > 0
        and inputs % per_row == 0
    )
    if scales.dtype not in FLOATS or not holds(format, inputs) or not fits or (inputs // per_row) % least:
        raise wrong(
            scales,
            f"is {scales.dtype} {list(scales.shape)}; group sizes must be multiples of {least}",
        )
    return Quantized(format, shape, codes, scales)


def _blame(found: Mapping[str, Entry], directory: Path) -> Path:
    """The file to name for a missing tensor: the only file, or the index."""
    paths = {entry.path for entry in found.values()}
    return paths.pop() if len(paths) == 1 else directory / (INDEX if paths else SINGLE)


def _check(entry: Entry, declared: ParamSpec) -> None:
    if entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{entry.path}: {entry.name}: has type {entry.dtype}; weights must have one of "
            f"{', '.join(FLOATS)}"
        )
    if entry.shape != declared.shape:
        raise CheckpointError(
            f"{entry.path}: {entry.name}: is {list(entry.shape)}, but config.json says "
            f"{list(declared.shape)}; was this checkpoint pruned?"
        )
