"""Checks that the files of a checkpoint have exactly the tensors of the model, with their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanohybrid.checkpoint.header import FLOATS, Entry
from nanohybrid.checkpoint.names import EMBEDDINGS, HEAD, is_ignored, model_name
from nanohybrid.checkpoint.quantized.find import take_matrices
from nanohybrid.checkpoint.quantized.settings import Settings
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError
from nanohybrid.model.quantized import quantizable
from nanohybrid.model.spec import ParamSpec, param_specs

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Matched:
    """The tensors by the model's names, quantized matrices as MatrixEntry; `head_copy` is a stored copy of a
    tied head."""

    tensors: dict[str, Entry]
    head_copy: Entry | None


def match(
    directory: Path, found: dict[str, Entry], config: HybridConfig, settings: Settings | None
) -> Matched:
    """Match the tensors of the files with those of the model. settings: of their quantization.

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
    matrices = {} if settings is None else take_matrices(named, quantizable(config), settings)
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
    return Matched(plain | matrices, copy)


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
