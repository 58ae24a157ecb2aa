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

EMBEDDINGS, FINAL, HEAD = "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"
ROWS = 4096  # of the head that are squared at once


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

    def head_norm(self) -> Tensor:
        """[E]: the L2 norm of the weights by which the head reads each channel."""
        ...

    def head_gram(self) -> Tensor:
        """[E, E]: W^T W of the head in fp32."""
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

    def head_norm(self) -> Tensor:
        return column_norm(self.model.head_weight)

    def head_gram(self) -> Tensor:
        return gram(self.model.head_weight)


class Stored:
    """The parts of a checkpoint, each read when it is wanted, in `dtype`: never more than one layer, or the embeddings as stored."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        self.reader, self.config, self.dtype, self.device = reader, reader.config, dtype, torch.device(device)

    def embedded(self, tokens: list[Tensor]) -> list[Tensor]:
        table_VE = self.reader.tensor(EMBEDDINGS)
        return [table_VE[tokens_T.cpu()].to(self.device, self.dtype) for tokens_T in tokens]

    def blocks(self) -> Iterator[Block]:
        for index, kind in enumerate(self.config.pattern):
            with torch.device("meta"):
                block = Block(self.config, kind)
            for name, _ in list(block.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                tensor = self.reader.tensor(f"backbone.layers.{index}.{name}", self.dtype, self.device)
                setattr(block.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
            yield block.eval()

    def final_norm(self) -> RMSNorm:
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden_size, self.config.layer_norm_epsilon)
        norm.weight = nn.Parameter(self.reader.tensor(FINAL, self.dtype, self.device), requires_grad=False)
        return norm

    def head_norm(self) -> Tensor:
        return column_norm(self._head())

    def head_gram(self) -> Tensor:
        return gram(self._head().to(self.device))

    def _head(self) -> Tensor:
        """[V, E], as stored."""
        return self.reader.tensor(EMBEDDINGS if self.config.tie_word_embeddings else HEAD)


def column_norm(weight_VE: Tensor) -> Tensor:
    """[E] in fp32, added up over slices of rows so that no second copy of the weight is made."""
    total_E = weight_VE.new_zeros(weight_VE.shape[1], dtype=torch.float32)
    for part_VE in weight_VE.detach().split(ROWS):
        total_E += part_VE.float().square().sum(0)
    return total_E.sqrt().cpu()


def gram(head_VE: Tensor) -> Tensor:
    """W^T W in fp32, added up over slices of the vocabulary."""
    total_EE = head_VE.new_zeros(head_VE.shape[1], head_VE.shape[1], dtype=torch.float32)
    for part_VE in head_VE.split(4 * ROWS):
        total_EE.addmm_(part_VE.float().T, part_VE.float())
    return total_EE
