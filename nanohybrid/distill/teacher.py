"""Where the teacher is while a student learns: beside it, quantized, on the disk layer by layer, or gone, its likeliest tokens kept.

    beside      all of it in fp32
    int8, fp8, int4   its matrices quantized, everything else in fp32: a quarter, a quarter, an eighth of the memory
    offloaded   read from its checkpoint layer by layer at every step: one layer and the head are in memory, and time is the price

With `top_k` it is asked once for every batch before the student begins. What it says is kept in one file a step, and it is gone while
the student learns. A kill loses one batch of it.

T tokens · E embedding · V vocabulary · R rows that are learned · K likeliest tokens.
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
from nanohybrid.prune.layerwise import EMBEDDINGS, HEAD, Stored

BESIDE, OFFLOADED, QUANTIZED = "beside", "offloaded", ("int8", "fp8", "int4")
PLACES = (BESIDE, OFFLOADED, *QUANTIZED)


class Teacher(Protocol):
    """What a loss asks of a teacher."""

    @property
    def device(self) -> torch.device: ...

    @property
    def head_weight(self) -> Tensor: ...

    def hidden(self, tokens_T: Tensor, layout: Layout) -> Tensor: ...


class Offloaded:
    """A checkpoint as a teacher, never more than one of its layers in memory, or its embeddings, or its head."""

    def __init__(self, reader: CheckpointReader, device: str | torch.device = "cpu") -> None:
        self.parts = Stored(reader, device=device)

    @property
    def device(self) -> torch.device:
        """Where each part goes when it is read."""
        return self.parts.device

    @property
    def head_weight(self) -> Tensor:
        """[V, E], read anew each time."""
        return self.parts.read(EMBEDDINGS if self.parts.config.tie_word_embeddings else HEAD)

    @torch.no_grad()
    def hidden(self, tokens_T: Tensor, layout: Layout) -> Tensor:
        """[T, E]: final hidden states, one layer after another."""
        (h_TE,) = self.parts.embedded([tokens_T])
        for block in self.parts.blocks():
            h_TE = block(h_TE, layout, None)
        final_TE: Tensor = self.parts.final_norm()(h_TE)
        return final_TE


@contextmanager
def teaching(checkpoint: Path, place: str, device: str | torch.device = "cpu") -> Iterator[Teacher]:
    """The checkpoint as a teacher, at its place; device: where it computes, which is where its student does."""
    if place == OFFLOADED:
        with CheckpointReader(checkpoint) as reader:
            yield Offloaded(reader, device)
        return
    quantize = place if place in QUANTIZED else None
    yield load(checkpoint, torch.float32, device, quantize).requires_grad_(False).eval()


@dataclass(frozen=True)
class Taught:
    """A batch with what the teacher said of the tokens that are learned."""

    batch: Batch
    rows_R: Tensor
    teacher: TopK

    @property
    def layout(self) -> Layout:
        return self.batch.layout

    def to(self, device: torch.device | str) -> Taught:
        """The same on a device."""
        return Taught(self.batch.to(device), self.rows_R.to(device), self.teacher.to(device))


@dataclass(frozen=True)
class Answers:
    """A teacher's likeliest tokens for the batches of a run, a file a step in `folder`."""

    folder: Path
    k: int
    temperature: float

    def file(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.safetensors"

    def ask(
        self, teacher: Teacher, batches: Callable[[int], Batch], rows: Callable[[Batch], Tensor], steps: range
    ) -> Iterator[int]:
        """Ask for what is not there yet, step by step; yields the tokens of each."""
        head_VE = teacher.head_weight
        for step in steps:
            batch = batches(step).to(teacher.device)
            if not self.file(step).exists():
                hidden_RE = teacher.hidden(batch.tokens_T, batch.layout)[rows(batch)]
                said = [
                    top_k_of(part_QE @ head_VE.T, self.k, self.temperature)
                    for part_QE in hidden_RE.split(default_chunk(len(head_VE)))
                ]
                tensors = {
                    "ids": torch.cat([part.ids_RK for part in said]).int(),
                    "log_p": torch.cat([part.log_p_RK for part in said]),
                    "log_rest": torch.cat([part.log_rest_R for part in said]),
                }
                atomic_write(
                    self.file(step),
                    save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}),
                )
            yield batch.layout.tokens

    def batch(self, batch: Batch, rows_R: Tensor, step: int) -> Taught:
        """The batch of a step with the answers to it."""
        try:
            found = load_file(self.file(step))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.file(step)}: cannot be read ({error}); remove it, and its batch will be asked again"
            ) from None
        return Taught(batch, rows_R, TopK(found["ids"].long(), found["log_p"], found["log_rest"]))
