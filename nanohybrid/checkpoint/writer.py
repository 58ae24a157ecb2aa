"""Writing of checkpoints tensor by tensor, in any order. The files are laid out first, from the shapes of the
configuration.

A killed process leaves no incomplete checkpoint that loads. All files are written to a temporary directory
and renamed. In an existing directory (of a stage) only the files of the checkpoint are replaced:
`config.json` is removed first and written last, so that in between nothing loads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint.config_fields import DENSE_TYPES
from nanohybrid.checkpoint.dialects import CONFIG, config_object, model_type
from nanohybrid.checkpoint.header import encode_header
from nanohybrid.checkpoint.match import INDEX, SINGLE
from nanohybrid.checkpoint.names import EMBEDDINGS, HEAD, disk_names
from nanohybrid.checkpoint.placement import SHARD_BYTES, TensorPlacement, place_tensors, shards
from nanohybrid.checkpoint.quantization import KEY, quantization_config
from nanohybrid.checkpoint.quantized.written import PLAIN, written_parts, written_tensors
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.files import flush, publish, scratch
from nanohybrid.gguf.texts import copy_texts
from nanohybrid.model.quantized import quantizable
from nanohybrid.model.spec import param_specs

GENERATION = "generation_config.json"
ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION,
)
STOP_IDS = (2, 11, 12)  # </s>, <SPECIAL_11>, <SPECIAL_12>: the stop ids of the official models


class CheckpointWriter:
    """Writes a checkpoint of `config` into `directory`, which appears on a clean exit of the context.

        with CheckpointWriter(out, config, torch.bfloat16, assets=original) as writer:
            for name in reader.names():
                writer.write(name, prune(reader.tensor(name)))

    dtype    of all tensors, or of each by name
    assets   a checkpoint from which tokenizer and chat template are taken
    formats  format of each matrix that is stored quantized, by name; `write_codes` writes these
    groups   weights that share a scale, of matrices where that is not the format's own number

    Raises InputError for a bad directory or dtype, and CheckpointError for disk errors and for missing,
    additional or wrong tensors.
    """

    def __init__(
        self,
        directory: str | Path,
        config: HybridConfig,
        dtype: torch.dtype | Mapping[str, torch.dtype],
        max_shard_bytes: int = SHARD_BYTES,
        assets: str | Path | None = None,
        formats: Mapping[str, str] | None = None,
        groups: Mapping[str, int] | None = None,
    ) -> None:
        self.formats, self._groups = dict(formats or {}), dict(groups or {})
        self.directory, self.config, self.assets = (
            Path(directory),
            config,
            None if assets is None else Path(assets),
        )
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{directory} is a file; a checkpoint needs a directory")
        self._tensors = place_tensors(config, dtype, self.formats, self._groups)
        self._shards = shards(self._tensors, max_shard_bytes)
        self._left = set(param_specs(config))
        self._into = self.directory.is_dir() and any(self.directory.iterdir())
        self._temporary = (
            self.directory / ".checkpoint.writing" if self._into else scratch(self.directory.resolve())
        )
        self._at: dict[str, tuple[Path, int, torch.dtype, tuple[int, ...]]] = {}

    def __enter__(self) -> CheckpointWriter:
        with self._disk_errors():
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)
            for file, tensors in self._shards.items():
                self._begin_shard(self._temporary / file, tensors)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor under its name in the model, cast to its stored type.

        Each tensor is written once, in any order.
        """
        if name in self.formats:
            raise CheckpointError(
                f"{self.directory}: {name}: is stored quantized ({self.formats[name]}); write it with "
                "write_codes"
            )
        self._expect(name)
        self._store(name, tensor)
        self._left.discard(name)
        if name == EMBEDDINGS and HEAD in self._at and self.config.tie_word_embeddings:
            self._store(HEAD, tensor)

    def write_codes(self, name: str, codes: Tensor, scales: Tensor) -> None:
        """Write one quantized matrix as codes and scales (ops/quantized/formats.py)."""
        self._expect(name)
        for part, tensor in written_tensors(codes, scales).items():
            self._store(name.removesuffix(PLAIN) + part, tensor)
        self._left.discard(name)

    def stored_bytes_of(self, name: str) -> int:
        """Bytes in the files of a tensor of the model: of its codes and scales, of a tied head's copy too."""
        if name in self.formats:
            shape = quantizable(self.config)[name]
            parts = [name.removesuffix(PLAIN) + part for part in written_parts(self.formats[name], *shape)]
        else:
            parts = [name, *([HEAD] if name == EMBEDDINGS and self.config.tie_word_embeddings else [])]
        return sum(placement.bytes for placement in self._tensors if placement.name in parts)

    def _expect(self, name: str) -> None:
        if name not in self._left:
            written = name in param_specs(self.config)
            raise CheckpointError(
                f"{self.directory}: {name}: "
                f"{'was written already' if written else 'is not a tensor of this model'}"
            )

    def _store(self, name: str, tensor: Tensor) -> None:
        path, begin, dtype, shape = self._at[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.directory}: {name}: is {list(tensor.shape)}, but the configuration says {list(shape)}"
            )
        data = (
            tensor.detach().to(device="cpu", dtype=dtype).contiguous().view(-1).view(torch.uint8).numpy().data
        )
        with self._disk_errors(), open(path, "r+b") as file:
            file.seek(begin)
            file.write(data)

    def _begin_shard(self, path: Path, tensors: list[TensorPlacement]) -> None:
        head, begins = encode_header(
            {placement.disk: (placement.dtype, placement.shape) for placement in tensors}
        )
        for placement in tensors:
            self._at[placement.name] = (path, begins[placement.disk], placement.dtype, placement.shape)
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(placement.bytes for placement in tensors))

    def _finish(self) -> None:
        if self._left:
            raise CheckpointError(
                f"{self.directory}: {min(self._left)}: was not written ({len(self._left)} tensors are "
                "missing)"
            )
        with self._disk_errors():
            self._write_texts()
            if self._into:
                _move_into(self._temporary, self.directory)
            else:
                publish(self._temporary, self.directory.resolve())

    def _write_texts(self) -> None:
        plain = [
            placement
            for placement in self._tensors
            if placement.name in param_specs(self.config) and placement.name not in self.formats
        ]
        common = max(
            {placement.dtype for placement in plain},
            key=lambda dtype: sum(placement.bytes for placement in plain if placement.dtype == dtype),
        )
        _dump(
            self._temporary / CONFIG,
            config_object(self.config, str(common).removeprefix("torch.")) | self._quantization(),
        )
        if len(self._shards) > 1:
            where = {placement.disk: file for file, tensors in self._shards.items() for placement in tensors}
            total = sum(placement.bytes for placement in self._tensors)
            _dump(
                self._temporary / INDEX,
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
            )
        _dump(self._temporary / GENERATION, _generation(self.config))
        if self.assets is not None:
            copy_texts(self.assets, ASSETS, self._temporary)

    def _quantization(self) -> dict[str, object]:
        """The quantization in config.json; empty without quantized matrices."""
        if not self.formats:
            return {}
        called = {name: disk.removesuffix(f".{PLAIN}") for name, disk in disk_names(self.config).items()}
        sizes = quantizable(self.config)
        plain = [called[name] for name in sizes if name not in self.formats]
        if self.config.tie_word_embeddings:
            plain.append(HEAD.removesuffix(f".{PLAIN}"))
        formats = {called[name]: format for name, format in self.formats.items()}
        widths = {called[name]: inputs for name, (_, inputs) in sizes.items()}
        groups = {called[name]: group for name, group in self._groups.items()}
        return {KEY: quantization_config(formats, widths, plain, groups)}

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: cannot be written ({error.strerror or error})"
            ) from None


def _generation(config: HybridConfig) -> dict[str, object]:
    official = model_type(config) not in DENSE_TYPES and config.vocab_size > max(STOP_IDS)
    stops = sorted({config.eos_token_id, *(STOP_IDS if official else ())})
    return {
        "_from_model_config": True, "bos_token_id": config.bos_token_id, "eos_token_id": stops,
        "pad_token_id": config.pad_token_id,
    }  # fmt: skip


def _dump(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _move_into(temporary: Path, directory: Path) -> None:
    """Replace the files of the checkpoint in a directory; other files stay."""
    written = sorted(path.name for path in temporary.iterdir())
    for name in written:
        flush(temporary / name)
    (directory / CONFIG).unlink(missing_ok=True)
    for old in [*directory.glob("model-*-of-*.safetensors"), directory / SINGLE, directory / INDEX]:
        if old.name not in written:
            old.unlink(missing_ok=True)
    for name in sorted(written, key=lambda name: name == CONFIG):
        os.replace(temporary / name, directory / name)
    flush(directory)
