"""The model under proof, a text for it to read, and what it says of that text read whole."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.verify.line import TOLERANCE, Line

LENGTH = 144  # past one border of 128, and short enough for billions of parameters on a CPU
M = TypeVar("M")
PAGE = 16  # so that a text spans several pages


class Subject:
    """A model and a text of random tokens. The truth is the text read in one piece, as in training."""

    def __init__(self, model: HybridLM, seed: int = 0) -> None:
        self.model = model.eval()
        self.device = model.device
        generator = torch.Generator().manual_seed(seed)
        self._remembered: dict[str, Any] = {}
        self.text = torch.randint(model.config.vocab_size, (LENGTH,), generator=generator).to(self.device)

    @cached_property
    def truth(self) -> Tensor:
        """Logits of the text read whole."""
        return self.read(self.text, [LENGTH])

    @cached_property
    def forgetful(self) -> float:
        """How far the logits move when every token is read without those before it."""
        return self.difference(self.read(self.text, [1] * LENGTH), self.truth)

    @torch.no_grad()
    def read(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits of documents packed end to end, nothing stored."""
        return self.model(tokens, Layout.packed(lengths))

    def state(self, slots: int) -> HybridCache:
        """Pools for `slots` texts of full length."""
        dtype = self.model.dtype
        return HybridCache.allocate(
            self.model.config, slots, slots * LENGTH // PAGE, PAGE, dtype, self.device
        )

    @torch.no_grad()
    def read_stored(
        self, pieces: Sequence[Tensor], positions: Sequence[int], slots: Sequence[int], state: HybridCache
    ) -> list[Tensor]:
        """Logits of one piece of each sequence, in one call that reads and writes the state."""
        lengths = [len(piece) for piece in pieces]
        layout = Layout.contiguous(lengths, positions, slots, LENGTH, PAGE)
        return list(self.model(torch.cat(list(pieces)), layout, state).split(lengths))

    def remembered(self, name: str, make: Callable[[], M]) -> M:
        """What several proofs compare with, made at first use."""
        if name not in self._remembered:
            self._remembered[name] = make()
        found: M = self._remembered[name]
        return found

    def difference(self, found: Tensor, expected: Tensor) -> float:
        """The largest difference relative to the largest logit; NaN where either holds one."""
        return (
            (found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        ).item()

    def line(self, what: str, on: str, found: Tensor, expected: Tensor) -> Line:
        """The result of comparing logits."""
        tolerance = TOLERANCE[self.model.dtype]
        return Line(what, on, self.difference(found, expected), tolerance, self.forgetful)
