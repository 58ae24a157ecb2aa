"""A model as its parts in the order of the forward pass: in memory, or read from a checkpoint one layer at a
time.

Measurements that need no more than this interface work on models larger than the memory.

T tokens · E hidden size · V vocabulary.
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

EMBEDDINGS, FINAL_NORM, HEAD = "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"
CHUNK_BYTES = 2**25
"""Bytes in fp32 of the rows of the embedding table or head that are read at once; two chunks may be in
memory."""


class LayerwiseModel(Protocol):
    """A model that gives its parts in the order of the forward pass."""

    config: HybridConfig
    device: torch.device

    def embedded(self, tokens: list[Tensor]) -> list[Tensor]:
        """Embeddings [T, E] for the tokens [T] of each batch."""
        ...

    def blocks(self) -> Iterator[Block]:
        """The layers in order; each is valid until the next is requested."""
        ...

    def final_norm(self) -> RMSNorm: ...

    def head_chunks(self) -> Iterator[Tensor]:
        """The head [V, E] in chunks of rows, in order."""
        ...


class LoadedModel:
    """A LayerwiseModel over a model in memory."""

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

    def head_chunks(self) -> Iterator[Tensor]:
        yield from self.model.head_weight.split(chunk_rows(self.config))


class StreamedModel:
    """A LayerwiseModel over a checkpoint: at most one layer, or one chunk of a table, is in memory, in
    `dtype`."""

    def __init__(
        self, reader: CheckpointReader, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self.reader, self.config, self.dtype, self.device = reader, reader.config, dtype, torch.device(device)

    def embedded(self, tokens: list[Tensor]) -> list[Tensor]:
        found = [
            torch.empty(len(tokens_T), self.config.hidden_size, dtype=self.dtype, device=self.device)
            for tokens_T in tokens
        ]
        rows = chunk_rows(self.config)
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
        norm.weight = nn.Parameter(self.read(FINAL_NORM), requires_grad=False)
        return norm

    def head_chunks(self) -> Iterator[Tensor]:
        rows = chunk_rows(self.config)
        name = EMBEDDINGS if self.config.tie_word_embeddings else HEAD
        for begin in range(0, self.config.vocab_size, rows):
            yield self.rows(name, begin, begin + rows)

    def read(self, name: str) -> Tensor:
        """One tensor of the model."""
        return self.reader.tensor(name, self.dtype, self.device)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """The rows from `begin` to `end` of a table."""
        return self.reader.rows(name)[begin:end].to(self.device, self.dtype)

    def pruned(self, selection: Selection) -> PrunedStream:
        """The same model pruned to a selection, each tensor sliced after it is read."""
        return PrunedStream(self, selection)


class PrunedStream(StreamedModel):
    """A LayerwiseModel of what pruning would write, without writing it: each tensor is sliced after it is
    read."""

    def __init__(self, whole: StreamedModel, selection: Selection) -> None:
        super().__init__(whole.reader, whole.dtype, whole.device)
        self.config, self.slices = prune_state(whole.config, selection)

    def read(self, name: str) -> Tensor:
        piece = self.slices[name]
        return piece.cut(self.reader.tensor(piece.source, self.dtype, self.device))

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        piece = self.slices[name]  # the vocabulary is never pruned
        return Slice(piece.source, (None, piece.indices[1])).cut(super().rows(piece.source, begin, end))


def chunk_rows(config: HybridConfig) -> int:
    """How many rows of a table are one chunk."""
    return max(1, CHUNK_BYTES // (4 * config.hidden_size))


def head_norm(model: LayerwiseModel) -> Tensor:
    """[E] in fp32: the L2 norm of the weights by which the head reads each channel."""
    total_E = torch.zeros(model.config.hidden_size, device=model.device)
    for chunk_VE in model.head_chunks():
        total_E += chunk_VE.detach().float().square().sum(0)
    return total_E.sqrt().cpu()


def head_gram(model: LayerwiseModel) -> Tensor:
    """[E, E] in fp32: W^T W of the head W [V, E], added up over chunks of the vocabulary."""
    size = model.config.hidden_size
    total_EE = torch.zeros(size, size, device=model.device)
    for chunk_VE in model.head_chunks():
        total_EE.addmm_(chunk_VE.detach().float().T, chunk_VE.detach().float())
    return total_EE
