"""A model as parts in the order of its forward: in memory, or read from a checkpoint one layer at a time.

What is measured layer by layer needs no more than this, so a model larger than the memory can be measured too.

T tokens · E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from nanohybrid.checkpoint import CheckpointReader
from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM
from nanohybrid.model.lm import Block
from nanohybrid.model.norms import RMSNorm
from nanohybrid.prune.selection import Selection
from nanohybrid.prune.slicing import Slice, prune_state

EMBEDDINGS, FINAL, HEAD = "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"
PIECE = 2**25  # bytes in fp32 of what is read of a table at once; the piece before it may still be held


class Parts(Protocol):
    """A model's parts."""

    config: HybridConfig
    device: torch.device

    def embedded(self, tokens: list[Tensor]) -> list[Tensor]:
        """[T, E] for the tokens of each batch."""
        ...

    def blocks(self) -> Iterator[Block]:
        """The layers in order; one is only good until the next is asked for."""
        ...

    def final_norm(self) -> RMSNorm: ...

    def head_pieces(self) -> Iterator[Tensor]:
        """The head [V, E] in pieces of some rows, in order."""
        ...


class Loaded:
    """The parts of a model in memory."""

    def __init__(self, model: HybridLM) -> None:
        self.model, self.config, self.device = model, model.config, model.device

    def embedded(self, tokens: list[Tensor]) -> list[Tensor]:
        return [self.model.backbone.embeddings(tokens_T) for tokens_T in tokens]

    def blocks(self) -> Iterator[Block]:
        for block in self.model.backbone.layers:
            assert isinstance(block, Block)
            yield block

    def final_norm(self) -> RMSNorm:
        return self.model.backbone.norm_f

    def head_pieces(self) -> Iterator[Tensor]:
        yield from self.model.head_weight.split(rows_of(self.config))


class Stored:
    """The parts of a checkpoint, each read when it is wanted, in `dtype`: never more than one layer, or some rows of a table."""

    def __init__(
        self, reader: CheckpointReader, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self.reader, self.config, self.dtype, self.device = reader, reader.config, dtype, torch.device(device)

    def embedded(self, tokens: list[Tensor]) -> list[Tensor]:
        found = [
            torch.empty(len(tokens_T), self.config.hidden_size, dtype=self.dtype, device=self.device)
            for tokens_T in tokens
        ]
        rows = rows_of(self.config)
        for begin in range(0, self.config.vocab_size, rows):
            table_VE = self.rows(EMBEDDINGS, begin, begin + rows)
            for tokens_T, found_TE in zip(tokens, found, strict=True):
                here_T = ((tokens_T >= begin) & (tokens_T < begin + len(table_VE))).nonzero().squeeze(1)
                found_TE[here_T] = table_VE[tokens_T[here_T] - begin]
        return found

    def blocks(self) -> Iterator[Block]:
        for index, kind in enumerate(self.config.pattern):
            with torch.device("meta"):
                block = Block(self.config, kind)
            for name, _ in list(block.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                tensor = self.read(f"backbone.layers.{index}.{name}")
                setattr(block.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
            yield block.eval()
            for (
                parameter
            ) in block.parameters():  # the caller still holds the block while the next one is read
                parameter.data = parameter.new_empty(0)

    def final_norm(self) -> RMSNorm:
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden_size, self.config.layer_norm_epsilon)
        norm.weight = nn.Parameter(self.read(FINAL), requires_grad=False)
        return norm

    def head_pieces(self) -> Iterator[Tensor]:
        rows = rows_of(self.config)
        name = EMBEDDINGS if self.config.tie_word_embeddings else HEAD
        for begin in range(0, self.config.vocab_size, rows):
            yield self.rows(name, begin, begin + rows)

    def read(self, name: str) -> Tensor:
        """One tensor of the model."""
        return self.reader.tensor(name, self.dtype, self.device)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some rows of a table."""
        return self.reader.rows(name)[begin:end].to(self.device, self.dtype)

    def cut(self, selection: Selection) -> Cut:
        """What remains of it, cut as it is read."""
        return Cut(self, selection)


class Cut(Stored):
    """The parts of a checkpoint as they are after pruning, without writing it: each tensor is cut after it is read."""

    def __init__(self, whole: Stored, selection: Selection) -> None:
        super().__init__(whole.reader, whole.dtype, whole.device)
        self.config, self.slices = prune_state(whole.config, selection)

    def read(self, name: str) -> Tensor:
        piece = self.slices[name]
        return piece.cut(self.reader.tensor(piece.source, self.dtype, self.device))

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        piece = self.slices[name]  # of the vocabulary nothing goes
        return Slice(piece.source, (None, piece.indices[1])).cut(super().rows(piece.source, begin, end))


def rows_of(config: HybridConfig) -> int:
    """How many rows of a table are a piece."""
    return max(1, PIECE // (4 * config.hidden_size))


def head_norm(parts: Parts) -> Tensor:
    """[E] in fp32: the L2 norm of the weights by which the head reads each channel."""
    total_E = torch.zeros(parts.config.hidden_size, device=parts.device)
    for part_VE in parts.head_pieces():
        total_E += part_VE.detach().float().square().sum(0)
    return total_E.sqrt().cpu()


def head_gram(parts: Parts) -> Tensor:
    """[E, E]: W^T W of the head in fp32, added up over slices of the vocabulary."""
    size = parts.config.hidden_size
    total_EE = torch.zeros(size, size, device=parts.device)
    for part_VE in parts.head_pieces():
        total_EE.addmm_(part_VE.detach().float().T, part_VE.detach().float())
    return total_EE
