"""Export of a checkpoint to one GGUF file: keys, tokenizer and weights, written tensor by tensor."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanohybrid.checkpoint import CheckpointReader, display_name, resolve
from nanohybrid.checkpoint.llama_cpp import Role, Target, Value, architecture, sizes, targets
from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.export.encode import byte_count, encode, fits
from nanohybrid.export.repack import matches, repack
from nanohybrid.export.rope import FREQUENCIES, check_scaling, divisors, scaling_keys
from nanohybrid.export.vocabulary import Vocabulary, read_vocabulary
from nanohybrid.extras import require
from nanohybrid.files import flush, scratch
from nanohybrid.gguf import is_gguf
from nanohybrid.ops.quantized import dequantize

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# value of --type -> type of matrices, type of embeddings, and GGUF's file type number
TYPES: dict[str, tuple[str, str, int]] = {
    "bf16": ("BF16", "BF16", 32),
    "f16": ("F16", "F16", 1),
    "f32": ("F32", "F32", 0),
    "q8_0": ("Q8_0", "Q8_0", 7),
    "q4_0": (
        "Q4_0",
        "Q8_0",
        2,
    ),  # embeddings are read by rows, so 8 bits cost no time, and a tied head needs them
}
WHERE_ROWS_ARE_NO_BLOCKS = "BF16"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file and its GGUF type."""

    source: str
    target: Target
    kind: GGMLQuantizationType
    bytes: int


class GgufExport:
    """An export. The checkpoint is checked on creation; `write` writes the file.

        with GgufExport(directory, "q8_0") as export:
            export.write(Path("model.gguf"))

    Raises CheckpointError or ConfigError for a damaged checkpoint, and InputError where llama.cpp has no
    architecture or no splitting rule for it.
    """

    def __init__(self, directory: str | Path, kind: str = "bf16") -> None:
        self._gguf = require("gguf", "gguf")
        if kind not in TYPES:
            raise InputError(f"unknown type {kind!r}; known are {', '.join(TYPES)}")
        self.kind = kind
        self.directory = resolve(directory)
        self.reader = CheckpointReader(self.directory)
        self.config: HybridConfig = self.reader.config
        self.architecture = architecture(self.config)
        check_scaling(self.config)
        self.vocabulary = read_vocabulary(self.directory, self.config.vocab_size)
        self.tensors = [self._stored(name, target) for name, target in targets(self.config).items()]
        self._divisors = divisors(self.config)
        if self._divisors is not None:
            target = Target(FREQUENCIES, tuple(self._divisors.shape), "vector")
            self.tensors.append(self._stored(FREQUENCIES, target))

    def __enter__(self) -> GgufExport:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(stored.bytes for stored in self.tensors)

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of the tensors of each GGUF type."""
        counts: Counter[str] = Counter()
        for stored in self.tensors:
            counts[stored.kind.name.lower()] += stored.bytes
        return dict(counts)

    def write(self, out: Path, progress: Callable[[int], object] | None = None) -> None:
        """Write the file `out`, replacing an older one; `progress` is called with the bytes of each written
        tensor.

        Raises InputError where the file cannot be written, CheckpointError for damaged weights.
        """
        if out.is_dir():
            raise InputError(
                f"{out} is a directory, but a GGUF is one file; give a file name, as {out / 'model.gguf'}"
            )
        self.reader.check_tied_head()
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = scratch(out.resolve())
        try:
            self._write(temporary, progress)
            flush(temporary)
            os.replace(temporary, out)
            flush(out.resolve().parent)
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror or error})") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _write(self, path: Path, progress: Callable[[int], object] | None) -> None:
        writer = self._gguf.GGUFWriter(path, self.architecture)
        try:
            self._add_keys(writer)
            for stored in self.tensors:
                writer.add_tensor_info(
                    stored.target.name, stored.target.shape, "float32", stored.bytes, stored.kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for stored in self.tensors:
                writer.write_tensor_data(self._encoded(stored))
                if progress is not None:
                    progress(stored.bytes)
        finally:
            writer.close()

    def _encoded(self, stored: GgufTensor) -> Any:
        format = self.reader.formats.get(stored.source)
        if self._divisors is not None and stored.source == FREQUENCIES:
            return encode(self._divisors, stored.kind, FREQUENCIES)
        if format is None:
            exact = torch.float32 if is_gguf(self.directory) else None  # of blocks, bf16 would be rounded
            stored_rows: Tensor = self.reader.tensor(stored.source, exact)
            tensor = in_pairs(stored_rows, stored.target.head_rows)
        else:
            codes, scales_NG = (
                in_pairs(rows, stored.target.head_rows) for rows in self.reader.codes(stored.source)
            )
            group = stored.target.shape[-1] // scales_NG.shape[1]
            if matches(format, group, stored.kind.name):
                return repack(codes, scales_NG).numpy()
            tensor = dequantize(codes, scales_NG, torch.float32)
        if stored.target.role == "decay":
            tensor = -tensor.float().exp()
        return encode(tensor.reshape(stored.target.shape), stored.kind, stored.source)

    def _stored(self, source: str, target: Target) -> GgufTensor:
        kinds = self._gguf.GGMLQuantizationType
        kind = kinds[_type_name(target.role, self.kind)]
        if not fits(target.shape, kind):
            kind = kinds[WHERE_ROWS_ARE_NO_BLOCKS]
        return GgufTensor(source, target, kind, byte_count(target.shape, kind))

    def _add_keys(self, writer: GGUFWriter) -> None:
        writer.add_name(display_name(self.directory))
        writer.add_file_type(TYPES[self.kind][2])
        writer.add_quantization_version(self._gguf.GGML_QUANT_VERSION)
        for key, value in {**sizes(self.config), **scaling_keys(self.config)}.items():
            _add(writer, f"{self.architecture}.{key}", value)
        if self.vocabulary is None:
            writer.add_tokenizer_model("none")  # llama.cpp then works with ids only
        else:
            _add_vocabulary(writer, self.vocabulary)


def _type_name(role: Role, kind: str) -> str:
    matrix, embedding, _ = TYPES[kind]
    return {"matrix": matrix, "embedding": embedding}.get(role, "F32")


def in_pairs(rows: Tensor, head_rows: int) -> Tensor:
    """Rows of heads in llama.cpp's order, 0, D/2, 1, D/2 + 1, ... of each head; as they are where D is 0."""
    if not head_rows:
        return rows
    return rows.view(-1, 2, head_rows // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _add(writer: GGUFWriter, key: str, value: Value | str) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_pad_token_id(vocabulary.pad)
    for add, number in zip(
        (writer.add_eot_token_id, writer.add_eom_token_id), vocabulary.more_stops, strict=False
    ):
        add(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
