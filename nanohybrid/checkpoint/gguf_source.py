"""The tensors of a GGUF file under the model's names: which blocks they are stored in, and in which order of
rows.

    plain    F32, F16, BF16: read as from safetensors
    blocks   Q8_0, Q4_0, Q4_K ...: decoded in pieces of at most 4 MiB to fp32, and rounded once to what is
             asked
    packed   Q4_0 -> int4, Q8_0 and Q5_0 -> int8, with groups of 32: the codes of the file. The scales are
             fp16 in the file and bf16 in our formats, so they are rounded (by 2^-9 at most)

Two kinds of tensors are stored in another form. `A_log` is there as -exp(A_log). The rows of a Llama's q_proj
and k_proj are in pairs, because llama.cpp rotates neighbors: of a head's D rows, ours 0, D/2, 1, D/2 + 1, ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from nanohybrid.checkpoint.header import Entry
from nanohybrid.checkpoint.llama_cpp import targets
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError, shown
from nanohybrid.gguf import GgufFile, GgufTensor
from nanohybrid.gguf.blocks import DTYPES, values
from nanohybrid.gguf.kinds import FLOATS, KINDS
from nanohybrid.gguf.rope import FREQUENCIES
from nanohybrid.model.quantized import quantizable
from nanohybrid.model.spec import param_specs

PIECE = 1 << 20  # weights that are decoded at once
GROUP = 32
SAME = {"Q4_0": "int4", "Q8_0": "int8", "Q5_0": "int8"}
"""The blocks whose codes are ours, and the format."""


@dataclass(frozen=True)
class BlockEntry(Entry):
    """A tensor in blocks, or one that is stored in another form; `dtype` is the name of GGUF's type.

    head_rows: rows of a head where their order is llama.cpp's, else 0. decay: whether it is -exp of ours.
    """

    head_rows: int = 0
    decay: bool = False

    @property
    def row_bytes(self) -> int:
        return (self.end - self.begin) // self.shape[0]


def entries(file: GgufFile, config: HybridConfig) -> dict[str, Entry]:
    """The tensors of the model in a file, by the model's names.

    Raises CheckpointError, naming file and tensor, for missing and additional tensors and other shapes.
    """
    found, wanted = dict(file.tensors), param_specs(config)
    result: dict[str, Entry] = {}
    found.pop(FREQUENCIES, None)  # read with the configuration
    for name, target in targets(config, file.architecture).items():
        tensor = found.pop(target.name, None)
        if tensor is None:
            raise file.wrong(f"{target.name} is missing; is it a file of the whole model?")
        if _without_ones(tensor.shape) != _without_ones(target.shape):
            raise CheckpointError(
                f"{tensor.path}: {target.name}: is {list(tensor.shape)}, but the metadata says "
                f"{list(target.shape)}"
            )
        result[name] = _entry(tensor, wanted[name].shape, target.head_rows, target.role == "decay")
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise file.wrong(f"{shown(next(iter(found)))}{more}: is no tensor of its {file.architecture}")
    return result


def packable(entries: Mapping[str, Entry], config: HybridConfig) -> dict[str, str]:
    """The matrices whose codes are in a format of ours, and the format of each."""
    names = quantizable(config)
    return {
        name: SAME[entry.dtype] for name, entry in entries.items() if entry.dtype in SAME and name in names
    }


def _entry(tensor: GgufTensor, shape: tuple[int, ...], head_rows: int, decay: bool) -> Entry:
    place = (tensor.path, tensor.name, tensor.kind, shape, tensor.begin, tensor.end)
    if tensor.kind in FLOATS and not head_rows and not decay:
        return Entry(*place)
    return BlockEntry(*place, head_rows, decay)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def decoded(file: BinaryIO, entry: BlockEntry, begin: int, end: int) -> Iterator[Tensor]:
    """Rows [begin, end) of the model's tensor in fp32, some at a time."""
    step = max(1, PIECE // max(1, entry.shape[-1] if len(entry.shape) > 1 else 1))
    if entry.head_rows:
        step = max(entry.head_rows, step // entry.head_rows * entry.head_rows)
    first = begin - begin % step if entry.head_rows else begin
    for at in range(first, end, step):
        last = min(at + step, entry.shape[0])
        rows = values(_raw(file, entry, at, last), entry.dtype).float().view(last - at, -1)
        rows = _a_log(rows, entry) if entry.decay else _unpaired(rows, entry.head_rows)
        yield rows[max(begin - at, 0) : min(end, last) - at]


def packed_bytes(format: str, outputs: int, inputs: int) -> int:
    """Bytes of codes and scales in groups of 32."""
    return outputs * (inputs // (2 if format == "int4" else 1) + inputs // GROUP * 2)


def codes_and_scales(file: BinaryIO, entry: Entry) -> tuple[Tensor, Tensor]:
    """Codes and scales (ops/quantized/formats.py, groups of 32) of a matrix in one of the blocks of SAME."""
    outputs, inputs = entry.shape
    codes, scales_NG = [], torch.empty(outputs, inputs // GROUP, dtype=torch.bfloat16)
    step = max(1, PIECE // inputs)
    for begin in range(0, outputs, step):
        end = min(begin + step, outputs)
        blocks = _raw(file, entry, begin, end).view(end - begin, -1, KINDS[entry.dtype].bytes)
        scales_NG[begin:end] = blocks[..., :2].contiguous().view(torch.float16)[..., 0].to(torch.bfloat16)
        codes.append(_codes(blocks, entry.dtype))
    whole = torch.cat(codes)
    rows = entry.head_rows if isinstance(entry, BlockEntry) else 0
    return _unpaired(whole, rows), _unpaired(scales_NG, rows)


def _codes(blocks: Tensor, kind: str) -> Tensor:
    """[rows, blocks, bytes] -> int8 [rows, K], or uint8 [rows, K / 2] with even columns in the low bits."""
    if kind == "Q8_0":
        return blocks[..., 2:].contiguous().view(torch.int8).flatten(1)
    if kind == "Q5_0":
        unit = blocks.clone()
        unit[..., 0], unit[..., 1] = 0, 0x3C  # the fp16 number 1
        return values(unit.flatten(), kind).to(torch.int8).view(len(blocks), -1)
    in_order = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], dim=-1).flatten(1)
    return in_order[:, 0::2] | (in_order[:, 1::2] << 4)


def _raw(file: BinaryIO, entry: Entry, begin: int, end: int) -> Tensor:
    """The bytes of rows [begin, end) as they are stored."""
    row_bytes = (entry.end - entry.begin) // entry.shape[0]
    result = torch.empty((end - begin) * row_bytes, dtype=torch.uint8)
    file.seek(entry.begin + begin * row_bytes)
    memory = result.numpy().data
    while memory:
        got = file.readinto(memory)  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(
                f"{entry.path}: {entry.name}: the file ends within it; is it being written to?"
            )
        memory = memory[got:]
    return result


def _unpaired(rows: Tensor, head_rows: int) -> Tensor:
    """Rows of whole heads in our order, from llama.cpp's; as they are where head_rows is 0."""
    if not head_rows:
        return rows
    return rows.view(-1, head_rows // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _a_log(decay: Tensor, entry: Entry) -> Tensor:
    """A_log from -exp(A_log), so that the model computes the stored value again.

    Of the bf16 number and the fp32 numbers nearest to the logarithm, it is the first whose exp is the value.
    Raises CheckpointError where a value is not below 0.
    """
    wanted = -decay
    if not bool((wanted > 0).all()):
        raise CheckpointError(f"{entry.path}: {entry.name}: has values that are not below 0")
    exact = wanted.double().log().float()
    result, done = exact.clone(), torch.zeros_like(exact, dtype=torch.bool)
    up, down = (torch.full_like(exact, bound) for bound in (torch.inf, -torch.inf))
    for candidate in (exact.bfloat16().float(), exact, exact.nextafter(up), exact.nextafter(down)):
        fits = (candidate.exp() == wanted) & ~done
        result[fits], done = candidate[fits], done | fits
    return result


def matrix_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """The type in which matrices are read: bf16 where any is in blocks, else that of most of their bytes.

    A model computes in one type, and files mix them: where rows are no whole blocks, llama.cpp keeps fp16.
    """
    count: Counter[str] = Counter()
    for entry in entries.values():
        if len(entry.shape) == 2:
            count[entry.dtype] += entry.end - entry.begin
    return torch.bfloat16 if count.keys() - set(FLOATS) else DTYPES[max(count, key=count.__getitem__)]


def told(
    matrices: Mapping[str, Entry], formats: Mapping[str, str], packed: Set[str], dtype: torch.dtype
) -> str:
    """One line on the matrices of a file that do not stay what they are in it; empty where all do.

    formats: of each matrix that becomes quantized. packed: those of them that keep their codes. dtype: of the
    others.
    """
    counts: Counter[tuple[str, str]] = Counter()
    name_of = str(dtype).removeprefix("torch.")
    for name, entry in matrices.items():
        if name in formats:
            became = f"{'unchanged' if name in packed else 'quantized'} as {formats[name]}"
        elif entry.dtype not in FLOATS:
            became = f"dequantized to {name_of}"
        elif torch.promote_types(DTYPES[entry.dtype], dtype) != dtype:
            became = f"rounded to {name_of}"
        else:
            continue
        counts[entry.dtype, became] += 1
    line = ", ".join(f"{kind} ({count}) {became}" for (kind, became), count in counts.items())
    return line + ("; scales rounded from fp16 to bf16" if packed else "")
