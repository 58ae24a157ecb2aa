"""The tensors of a checkpoint's files against what the layers declare: each there, of its shape, and no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from nanohybrid.checkpoint.header import FLOATS, Entry
from nanohybrid.checkpoint.names import EMBEDDINGS, HEAD, is_ignored, model_name
from nanohybrid.checkpoint.quantization import ASIDE, PACKED, PLAIN, SCALE, SHAPE
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError
from nanohybrid.model.quantized import quantizable
from nanohybrid.model.spec import ParamSpec, param_specs
from nanohybrid.ops.quantized import group_of, holds

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Quantized:
    """A matrix on the disk as codes and scales."""

    format: str
    shape: tuple[int, int]  # of the matrix, [out, in]
    codes: Entry
    scales: Entry


@dataclass(frozen=True)
class Matched:
    """The tensors by the model's names; a tied head's copy if there is one."""

    plain: dict[str, Entry]
    quantized: dict[str, Quantized]
    head_copy: Entry | None


def match(directory: Path, found: dict[str, Entry], config: HybridConfig, quantized: bool) -> Matched:
    """Every tensor of the model, checked against the declaration. quantized: whether config.json says that some matrices are."""
    wanted = param_specs(config)
    named: dict[str, Entry] = {}
    for disk, entry in found.items():
        name = model_name(disk, config)
        if name in named:
            raise CheckpointError(
                f"{entry.path}: {disk}: is the same tensor as {named[name].name}; which one counts?"
            )
        named[name] = entry
    matrices = _matrices(named, config) if quantized else {}
    plain = {name: named.pop(name) for name in wanted if name in named}
    copy = named.pop(HEAD, None) if config.tie_word_embeddings else None
    extra = [entry for entry in named.values() if not is_ignored(entry.name)]
    for name, declared in wanted.items():
        if name not in plain and name not in matrices:
            hint = f", and {extra[0].name} is no tensor of this model" if extra else ""
            raise CheckpointError(f"{_blame(found, directory)}: {name}: is missing{hint}")
        if name in plain:
            _check(plain[name], declared)
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{extra[0].path}: {extra[0].name}{more}: is no tensor of the model that config.json describes"
        )
    if copy is not None:
        _check(copy, wanted[EMBEDDINGS])
    return Matched(plain, matrices, copy)


def _matrices(named: dict[str, Entry], config: HybridConfig) -> dict[str, Quantized]:
    """Take the parts of quantized matrices out of `named`, and what goes with them."""
    found = {}
    for name, shape in quantizable(config).items():
        owner = name.removesuffix(PLAIN)
        codes = named.get(owner + PACKED) or named.get(name)
        if codes is not None and codes.dtype not in FLOATS:
            scales = named.pop(owner + SCALE, None)
            found[name] = _quantized(codes, scales, shape)
            del named[owner + PACKED if codes is named.get(owner + PACKED) else name]
            named.pop(owner + SHAPE, None)
    for name in [name for name in named if name.rpartition(".")[2] in ASIDE]:
        del named[name]
    return found


def _quantized(codes: Entry, scales: Entry | None, shape: tuple[int, int]) -> Quantized:
    """The parts of one matrix, of a known form and of the shapes that belong together."""

    def wrong(entry: Entry, what: str) -> CheckpointError:
        return CheckpointError(f"{entry.path}: {entry.name}: {what}")

    outputs, inputs = shape
    known = {"I8": ("int8", inputs), "F8_E4M3": ("fp8", inputs)}
    if codes.dtype == "I32" and codes.shape == (outputs, inputs // 4) and inputs % 4 == 0:
        known["I32"] = ("int8", inputs // 4)
    elif codes.dtype == "I32" and inputs % 8 == 0:
        known["I32"] = ("int4", inputs // 8)
    if codes.dtype not in known:
        raise wrong(
            codes,
            f"is of type {codes.dtype} {list(codes.shape)}, which is no form of a quantized [{outputs}, {inputs}]",
        )
    format, width = known[codes.dtype]
    if codes.shape != (outputs, width):
        raise wrong(
            codes,
            f"is {list(codes.shape)} and config.json says {[outputs, width]}; was this checkpoint pruned?",
        )
    if scales is None:
        raise wrong(codes, f"has no {SCALE} beside it")
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
            f"is {scales.dtype} {list(scales.shape)}: scales of groups of {least} or of multiples of it are known",
        )
    return Quantized(format, shape, codes, scales)


def _blame(found: Mapping[str, Entry], directory: Path) -> Path:
    """The file to name where a tensor is nowhere: the only one, or the index."""
    paths = {entry.path for entry in found.values()}
    return paths.pop() if len(paths) == 1 else directory / (INDEX if paths else SINGLE)


def _check(entry: Entry, declared: ParamSpec) -> None:
    if entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{entry.path}: {entry.name}: is of type {entry.dtype}: weights must be one of {', '.join(FLOATS)}"
        )
    if entry.shape != declared.shape:
        raise CheckpointError(
            f"{entry.path}: {entry.name}: is {list(entry.shape)} and config.json says {list(declared.shape)}; was this checkpoint pruned?"
        )
