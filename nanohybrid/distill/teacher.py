"""Where the teacher is while a student learns.

    beside            in memory, in fp32
    int8, fp8, int4   in memory, with quantized matrices: a quarter, a quarter, an eighth of the memory
    offloaded         on disk: every step reads it layer by layer; one layer and the head are in memory

With `top_k` the teacher runs first. Its most probable tokens for every batch are stored in one file a step,
and it is not in memory while the student learns. A kill loses one batch of them.

T tokens · E hidden size · V vocabulary · R tokens that count in the loss · K tokens that are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from nanohybrid.checkpoint import CheckpointReader, load
from nanohybrid.data import Batch
from nanohybrid.errors import InputError
from nanohybrid.files import atomic_write
from nanohybrid.model import Layout
from nanohybrid.ops.losses import TopK, top_k_of
from nanohybrid.ops.losses.stream import default_chunk
from nanohybrid.prune.layerwise import EMBEDDINGS, HEAD, StreamedModel

BESIDE, OFFLOADED, QUANTIZED = "beside", "offloaded", ("int8", "fp8", "int4")
PLACES = (BESIDE, OFFLOADED, *QUANTIZED)


class Teacher(Protocol):
    """What the losses need of a teacher. A HybridLM is one."""

    @property
    def device(self) -> torch.device: ...

    @property
    def head_weight(self) -> Tensor: ...

    def hidden(self, tokens_T: Tensor, layout: Layout) -> Tensor: ...


class OffloadedTeacher:
    """A teacher on disk: at most one of its layers, its embeddings or its head is in memory."""

    def __init__(self, reader: CheckpointReader, device: str | torch.device = "cpu") -> None:
        self.model = StreamedModel(reader, device=device)

    @property
    def device(self) -> torch.device:
        """Where each part goes when it is read."""
        return self.model.device

    @property
    def head_weight(self) -> Tensor:
        """[V, E], read each time."""
        return self.model.read(EMBEDDINGS if self.model.config.tie_word_embeddings else HEAD)

    @torch.no_grad()
    def hidden(self, tokens_T: Tensor, layout: Layout) -> Tensor:
        """Final hidden states [T, E], one layer after another."""
        (h_TE,) = self.model.embedded([tokens_T])
        for block in self.model.blocks():
            h_TE = block(h_TE, layout, None)
        final_TE: Tensor = self.model.final_norm()(h_TE)
        return final_TE


@contextmanager
def open_teacher(checkpoint: Path, place: str, device: str | torch.device = "cpu") -> Iterator[Teacher]:
    """The checkpoint as a teacher. place: one of PLACES. device: where it computes; the student must be there
    too."""
    if place == OFFLOADED:
        with CheckpointReader(checkpoint) as reader:
            yield OffloadedTeacher(reader, device)
        return
    quantize = place if place in QUANTIZED else None
    yield load(checkpoint, torch.float32, device, quantize).requires_grad_(False).eval()


@dataclass(frozen=True)
class CachedTeacherBatch:
    """A batch, the tokens [R] of it that count in the loss, and the teacher's top-k distributions of
    these."""

    batch: Batch
    rows_R: Tensor
    top_k: TopK

    @property
    def layout(self) -> Layout:
        """The layout of the batch."""
        return self.batch.layout

    def to(self, device: torch.device | str) -> CachedTeacherBatch:
        """The same on a device."""
        return CachedTeacherBatch(self.batch.to(device), self.rows_R.to(device), self.top_k.to(device))


@dataclass(frozen=True)
class TeacherCache:
    """The teacher's `k` most probable tokens for the batches of a run, one file a step in `folder`."""

    folder: Path
    k: int
    temperature: float

    def file(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:06d}.safetensors"

    def fill(
        self, teacher: Teacher, batches: Callable[[int], Batch], rows: Callable[[Batch], Tensor], steps: range
    ) -> Iterator[int]:
        """Run the teacher for the steps whose file does not exist; yields the tokens of each step."""
        head_VE = teacher.head_weight
        for step in steps:
            batch = batches(step).to(teacher.device)
            if not self.file(step).exists():
                hidden_RE = teacher.hidden(batch.tokens_T, batch.layout)[rows(batch)]
                found = [
                    top_k_of(part_QE @ head_VE.T, self.k, self.temperature)
                    for part_QE in hidden_RE.split(default_chunk(len(head_VE)))
                ]
                tensors = {
                    "ids": torch.cat([part.ids_RK for part in found]).int(),
                    "log_p": torch.cat([part.log_p_RK for part in found]),
                    "log_rest": torch.cat([part.log_rest_R for part in found]),
                }
                data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
                atomic_write(self.file(step), data)
            yield batch.layout.tokens

    def batch(self, batch: Batch, rows_R: Tensor, step: int) -> CachedTeacherBatch:
        """The batch of a step with the stored distributions. Raises InputError where their file cannot be
        read."""
        try:
            found = load_file(self.file(step))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.file(step)}: cannot be read ({error}); remove it, and run the command again"
            ) from None
        return CachedTeacherBatch(batch, rows_R, TopK(found["ids"].long(), found["log_p"], found["log_rest"]))
