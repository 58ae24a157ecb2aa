"""Writing a checkpoint tensor by tensor, in any order: shapes are known from the configuration, so the files are laid out first.

A kill cannot leave half a checkpoint under a name that loads: everything is written beside and renamed. A new directory appears
whole. In a directory that exists (a stage's) only the checkpoint's own files are replaced: `config.json` goes first and comes back
last, so that between the two renames nothing loads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint.dialects import CONFIG, NEMOTRON, OWN, config_object, model_type
from nanohybrid.checkpoint.header import NAMES, encode_header
from nanohybrid.checkpoint.names import EMBEDDINGS, HEAD, disk_names
from nanohybrid.checkpoint.reader import INDEX, SINGLE
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.files import flush, publish, scratch
from nanohybrid.model.declare import parameters

SHARD_BYTES = 5 * 10**9
GENERATION = "generation_config.json"
ASSETS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GENERATION)
STOPS = (2, 11, 12)  # </s>, <SPECIAL_11>, <SPECIAL_12>: where the official models stop

Placed = tuple[str, str, torch.dtype, tuple[int, ...]]  # our name, the name on disk, type, shape


class CheckpointWriter:
    """Writes a checkpoint of `config` into `directory`; a context manager whose clean exit makes it appear.

        with CheckpointWriter(out, config, torch.bfloat16, assets=parent) as writer:
            for name in reader.names():
                writer.write(name, prune(reader.tensor(name)))

    dtype: one for all tensors, or by name. assets: a directory from which tokenizer and chat template are copied.
    """

    def __init__(
        self,
        directory: str | Path,
        config: HybridConfig,
        dtype: torch.dtype | Mapping[str, torch.dtype],
        max_shard_bytes: int = SHARD_BYTES,
        assets: str | Path | None = None,
    ) -> None:
        self.directory, self.config, self.assets = Path(directory), config, None if assets is None else Path(assets)
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{directory} is a file, and a checkpoint is a directory: give another name")
        self._tensors = _tensors(config, dtype)
        self._shards = _plan(self._tensors, max_shard_bytes)
        self._left = set(parameters(config))
        self._into = self.directory.is_dir() and any(self.directory.iterdir())
        self._beside = self.directory / ".checkpoint.writing" if self._into else scratch(self.directory.resolve())
        self._at: dict[str, tuple[Path, int, torch.dtype, tuple[int, ...]]] = {}

    def __enter__(self) -> CheckpointWriter:
        with self._disk_errors():
            shutil.rmtree(self._beside, ignore_errors=True)
            self._beside.mkdir(parents=True)
            for file, tensors in self._shards.items():
                self._begin_shard(self._beside / file, tensors)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._beside, ignore_errors=True)

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor under the model's name for it, cast to the type it is saved in; in any order, each once."""
        if name not in self._left:
            raise CheckpointError(
                f"{self.directory}: {name}: {'was written already' if name in self._at else 'is no tensor of this model'}"
            )
        shape = self._at[name][3]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{self.directory}: {name}: is {list(tensor.shape)}, the configuration says {list(shape)}")
        self._left.discard(name)
        self._store(name, tensor)
        if name == EMBEDDINGS and HEAD in self._at and self.config.tie_word_embeddings:
            self._store(HEAD, tensor)

    def _store(self, name: str, tensor: Tensor) -> None:
        path, begin, dtype, _ = self._at[name]
        data = tensor.detach().to(device="cpu", dtype=dtype).contiguous().view(-1).view(torch.uint8).numpy().data
        with self._disk_errors(), open(path, "r+b") as file:
            file.seek(begin)
            file.write(data)

    def _begin_shard(self, path: Path, tensors: list[Placed]) -> None:
        head, begins = encode_header({disk: (dtype, shape) for _, disk, dtype, shape in tensors})
        for name, disk, dtype, shape in tensors:
            self._at[name] = (path, begins[disk], dtype, shape)
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(_bytes(placed) for placed in tensors))

    def _finish(self) -> None:
        if self._left:
            raise CheckpointError(f"{self.directory}: {min(self._left)}: was not written ({len(self._left)} tensors are missing)")
        with self._disk_errors():
            self._write_texts()
            if self._into:
                _move_into(self._beside, self.directory)
            else:
                publish(self._beside, self.directory.resolve())

    def _write_texts(self) -> None:
        common = max({placed[2] for placed in self._tensors}, key=lambda dtype: sum(_bytes(p) for p in self._tensors if p[2] == dtype))
        _dump(self._beside / CONFIG, config_object(self.config, str(common).removeprefix("torch.")))
        if len(self._shards) > 1:
            where = {placed[1]: file for file, tensors in self._shards.items() for placed in tensors}
            total = sum(_bytes(placed) for placed in self._tensors)
            _dump(self._beside / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
        _dump(self._beside / GENERATION, _generation(self.config))
        for name in ASSETS:
            if self.assets is not None and (self.assets / name).is_file():
                shutil.copyfile(self.assets / name, self._beside / name)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot be written ({error.strerror or error})") from None


def _tensors(config: HybridConfig, dtype: torch.dtype | Mapping[str, torch.dtype]) -> list[Placed]:
    """What is to be written, in the order of the forward pass. A tied head of a hybrid is written too, for readers that know no tie."""
    declared, disk = parameters(config), disk_names(config)
    dtypes = {name: dtype if isinstance(dtype, torch.dtype) else dtype[name] for name in declared}
    for name, kind in dtypes.items():
        if kind not in NAMES:
            raise InputError(f"{name} cannot be saved as {kind}: known are {', '.join(str(known) for known in NAMES)}")
    result = [(name, disk[name], dtypes[name], declared[name].shape) for name in declared]
    if config.tie_word_embeddings and model_type(config) in (NEMOTRON, OWN):
        result.append((HEAD, HEAD, dtypes[EMBEDDINGS], declared[EMBEDDINGS].shape))
    return result


def _bytes(placed: Placed) -> int:
    return prod(placed[3]) * placed[2].itemsize


def _plan(tensors: list[Placed], most: int) -> dict[str, list[Placed]]:
    """Files and what lies in each: in order, as many as fit in `most` bytes, at least one."""
    shards: list[list[Placed]] = [[]]
    for placed in tensors:
        if shards[-1] and sum(map(_bytes, shards[-1])) + _bytes(placed) > most:
            shards.append([])
        shards[-1].append(placed)
    for shard in shards:
        shard.sort(key=lambda placed: -placed[2].itemsize)  # so that each tensor is aligned to its type
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{index:05d}-of-{len(shards):05d}.safetensors": shard for index, shard in enumerate(shards, 1)}


def _generation(config: HybridConfig) -> dict[str, object]:
    stops = sorted({config.eos_token_id, *(STOPS if model_type(config) != "qwen3" and config.vocab_size > max(STOPS) else ())})
    return {
        "_from_model_config": True, "bos_token_id": config.bos_token_id, "eos_token_id": stops, "pad_token_id": config.pad_token_id,
    }  # fmt: skip


def _dump(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _move_into(beside: Path, directory: Path) -> None:
    """Replace the checkpoint's files in a directory that keeps its others."""
    written = sorted(path.name for path in beside.iterdir())
    for name in written:
        flush(beside / name)
    (directory / CONFIG).unlink(missing_ok=True)
    for old in [*directory.glob("model-*-of-*.safetensors"), directory / SINGLE, directory / INDEX]:
        if old.name not in written:
            old.unlink(missing_ok=True)
    for name in sorted(written, key=lambda name: name == CONFIG):
        os.replace(beside / name, directory / name)
    flush(directory)
