"""The model under test, a text for it to read, and the reference: the plain forward over the whole text.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from nanohybrid.executors import Executor, TorchExecutor
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.ops.sizes import PAGE
from nanohybrid.verify.result import TOLERANCE, CheckResult

LENGTH = 144  # more than one chunk of 128, and short enough for a 9B model on a CPU
SMALL_PAGE = 16  # so that a text spans several pages, where the executor allows pages of any size
M = TypeVar("M")


class ModelUnderTest:
    """A model and a text of random tokens.

    The reference is the text read whole by the plain model, as in training.
    """

    def __init__(self, model: HybridLM, seed: int = 0) -> None:
        self.model = model.eval()
        self.device = model.device
        generator = torch.Generator().manual_seed(seed)
        self._memo: dict[str, Any] = {}
        self.text = torch.randint(model.config.vocab_size, (LENGTH,), generator=generator).to(self.device)

    @cached_property
    def reference(self) -> Tensor:
        """Logits [LENGTH, V] of the text read whole."""
        return self.read(self.text, [LENGTH])

    @cached_property
    def memoryless(self) -> float:
        """Relative difference of the logits if every token is read without context (the memoryless baseline)."""
        return self.difference(self.read(self.text, [1] * LENGTH), self.reference)

    @torch.no_grad()
    def read(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits of packed documents by the plain forward, without a cache."""
        return self.model(tokens, Layout.packed(lengths))

    def read_alone(self, first: int, last: int) -> Tensor:
        """Logits of a part of the text as a document of its own; computed once."""
        return self.memoize(f"alone {first} {last}", lambda: self.read(self.text[first:last], [last - first]))

    def memoize(self, name: str, make: Callable[[], M]) -> M:
        """A value that several checks share, computed at first use."""
        if name not in self._memo:
            self._memo[name] = make()
        found: M = self._memo[name]
        return found

    def forget(self, name: str) -> None:
        """Drop a memoized value."""
        self._memo.pop(name, None)

    def difference(self, found: Tensor, expected: Tensor) -> float:
        """The largest difference, relative to the largest logit; NaN if either tensor contains NaN."""
        largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        return ((found - expected).abs().max() / largest).item()

    def result(self, what: str, on: str, found: Tensor, expected: Tensor) -> CheckResult:
        """The result of comparing logits."""
        return CheckResult(
            what, on, self.difference(found, expected), TOLERANCE[self.model.dtype], self.memoryless
        )


class ExecutorUnderTest:
    """One executor of the model: makes a cache of its own for each check, and reads pieces of texts through it."""

    def __init__(
        self,
        subject: ModelUnderTest,
        name: str,
        make: Callable[[HybridLM, HybridCache], Executor] = TorchExecutor,
        page_size: int = SMALL_PAGE,
    ) -> None:
        self.subject, self.name, self._make, self._page_size = subject, name, make, page_size

    def open(self, slots: int) -> Executor:
        """The executor over an empty cache for `slots` texts of full length, and a spare slot and page."""
        pages = (slots + 1) * -(-LENGTH // self._page_size) + 1
        model = self.subject.model
        return self._make(
            model,
            HybridCache.allocate(model.config, slots + 1, pages, self._page_size, model.dtype, model.device),
        )

    @torch.no_grad()
    def read(
        self, executor: Executor, pieces: Sequence[Tensor], positions: Sequence[int], slots: Sequence[int]
    ) -> list[Tensor]:
        """Logits of one piece of each sequence, in one call that reads and writes the executor's cache."""
        lengths = [len(piece) for piece in pieces]
        layout = Layout.contiguous(lengths, positions, slots, LENGTH, self._page_size)
        _, logits = executor.run(torch.cat(list(pieces)), layout, range(layout.tokens))
        return list(logits.clone().split(lengths))


def executors_of(subject: ModelUnderTest) -> list[ExecutorUnderTest]:
    """The executors that can run the model as it is on this machine: torch, and CUDA graphs where they apply."""
    from nanohybrid.executors.cuda_graphs import GraphExecutor, cuda_graph, graphs_apply

    found = [ExecutorUnderTest(subject, TorchExecutor.name)]
    if graphs_apply(subject.model):

        def graphs(model: HybridLM, cache: HybridCache) -> Executor:
            eager = TorchExecutor(model, cache)
            return GraphExecutor(eager, most_rows=cache.slots - 1, context=LENGTH, capture=cuda_graph)

        found.append(ExecutorUnderTest(subject, GraphExecutor.name, graphs))
    return found


def packed_executor(subject: ModelUnderTest) -> ExecutorUnderTest | None:
    """The CPU kernels, for which the model is packed in place; None where they cannot run it."""
    from nanohybrid.executors.cpu.weights import prepare

    if not prepare(subject.model):
        return None
    from nanohybrid.executors.cpu.forward import CpuExecutor

    return ExecutorUnderTest(subject, CpuExecutor.name, CpuExecutor, PAGE)
