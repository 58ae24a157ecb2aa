"""Asynchronous decoding with CUDA graphs: a step begins before the host knows the tokens of the last one.

The sampled tokens stay on the device and are the input of the next step, so the host's work (text, stop
strings, scheduling) overlaps with the device's. Only logits are computed ahead. They are sampled when the
host has caught up, so penalties, grammars and forced tokens apply as usual. A sequence that ended or was
cancelled in the meantime was computed once in vain; others may have joined.

S sequences · V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanohybrid.engine.sampler import SampleFuture, to_device
from nanohybrid.engine.scheduler import Work
from nanohybrid.executors.cuda_graphs import GraphExecutor
from nanohybrid.model import Layout


class _Prefetched(NamedTuple):
    """A step that was begun early: the ids of its requests, and its logits."""

    ids: list[int]
    logits_SV: Tensor


class AsyncDecoder:
    """Computes one token of each of many requests at a time.

    `prefetch_enabled`: whether steps may begin early. They may not where a request may be preempted or its
        draft rolled back, since its state must then be where the host believes it to be.
    """

    def __init__(self, graphs: GraphExecutor) -> None:
        self.graphs, self.prefetch_enabled = graphs, False
        self._prefetched: _Prefetched | None = None

    def reset(self) -> None:
        """Discard the step that was begun early."""
        self._prefetched = None

    @staticmethod
    def supports(work: Work) -> bool:
        """Whether this is a single token of an answer, without a draft."""
        return work.length == 1 and bool(work.request.tokens) and not work.request.draft

    def logits(self, work: list[Work]) -> Tensor:
        """Logits [S, V] after this work, from the step begun early where it has them.

        All of the work must be supported.
        """
        prefetched, self._prefetched = self._prefetched, None
        ids = [request.id for request, _, _ in work]
        if prefetched is not None and prefetched.ids == ids:
            return prefetched.logits_SV
        parts: list[Tensor] = []
        row: dict[int, int] = {}
        if prefetched is not None and not set(prefetched.ids).isdisjoint(ids):
            parts.append(prefetched.logits_SV.clone())  # the next replay may overwrite it
            row = {id_: index for index, id_ in enumerate(prefetched.ids)}
        left = [item for item in work if item.request.id not in row]
        if left:
            row |= {item.request.id: len(row) + index for index, item in enumerate(left)}
            tokens = [request.tokens[start - len(request.prompt)] for request, start, _ in left]
            parts.append(self.graphs.logits(tokens, self._layout(left)))
        return torch.cat(parts)[to_device([row[id_] for id_ in ids], parts[0].device)]

    def prefetch_next(self, work: list[Work], future: SampleFuture) -> None:
        """Begin the step that follows `work`, with the tokens that were sampled for it.

        Does nothing unless every request of it decodes and has a page for the next token.
        """
        size = self.graphs.cache.page_size
        if not self.prefetch_enabled or not all(map(self.supports, work)):
            return
        if all(request.pages and start + 1 < len(request.pages.ids) * size for request, start, _ in work):
            following = [Work(request, start + 1, 1) for request, start, _ in work]
            logits_SV = self.graphs.logits(future.token_S, self._layout(following))
            self._prefetched = _Prefetched([request.id for request, _, _ in work], logits_SV)

    def _layout(self, work: list[Work]) -> Layout:
        return Layout.with_cache(
            [1] * len(work),
            [start for _, start, _ in work],
            [request.slot.ids[0] for request, _, _ in work if request.slot],
            [request.pages.ids for request, _, _ in work if request.pages],
            self.graphs.cache.page_size,
        )
