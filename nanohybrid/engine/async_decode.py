"""Decode steps on graphs, the next one begun before the host knows the last one's tokens.

A step's tokens stay on the device and are the next step's input, so the host's work (texts, stops, scheduling) is done while the
device computes. Only the logits are computed ahead: they are sampled when the host has caught up, so penalties, grammars and forced
tokens apply as ever. Sequences that ended or were cancelled meanwhile were computed once in vain; others may have joined.

S sequences · V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanohybrid.engine.sampler import Drawn, sent
from nanohybrid.engine.scheduler import Work
from nanohybrid.executors.cuda_graphs import GraphExecutor
from nanohybrid.model import Layout


class _Begun(NamedTuple):
    """A step under way: the ids of its requests, and its logits."""

    ids: list[int]
    logits_SV: Tensor


class AheadDecoder:
    """One token of each of many requests at a time.

    `look_ahead` says whether steps may be begun early: not where a request may be put aside or its tokens taken back, since its
    state must then stand where the host believes it to stand.
    """

    def __init__(self, graphs: GraphExecutor) -> None:
        self.graphs, self.look_ahead = graphs, False
        self._begun: _Begun | None = None

    def reset(self) -> None:
        """Forget the step that was begun."""
        self._begun = None

    @staticmethod
    def takes(work: Work) -> bool:
        """Whether this is one token that the request wrote itself."""
        return work.length == 1 and bool(work.request.tokens) and not work.request.draft

    def logits(self, work: list[Work]) -> Tensor:
        """Logits [S, V] after this work, all of which it takes: from the step that was begun, where that has them."""
        begun, self._begun = self._begun, None
        ids = [request.id for request, _, _ in work]
        if begun is not None and begun.ids == ids:
            return begun.logits_SV
        parts: list[Tensor] = []
        row: dict[int, int] = {}
        if begun is not None and not set(begun.ids).isdisjoint(ids):
            parts.append(begun.logits_SV.clone())  # the next replay may overwrite it
            row = {id_: place for place, id_ in enumerate(begun.ids)}
        left = [item for item in work if item.request.id not in row]
        if left:
            row |= {item.request.id: len(row) + place for place, item in enumerate(left)}
            tokens = [request.tokens[start - len(request.prompt)] for request, start, _ in left]
            parts.append(self.graphs.logits(tokens, self._layout(left)))
        return torch.cat(parts)[sent([row[id_] for id_ in ids], parts[0].device)]

    def begin_next(self, work: list[Work], drawn: Drawn) -> None:
        """Begin the step that follows `work`, whose tokens were drawn in its order, where all of it decodes and has pages left."""
        size = self.graphs.cache.page_size
        if not self.look_ahead or not all(map(self.takes, work)):
            return
        if all(request.pages and start + 1 < len(request.pages.ids) * size for request, start, _ in work):
            following = [Work(request, start + 1, 1) for request, start, _ in work]
            logits_SV = self.graphs.logits(drawn.token_S, self._layout(following))
            self._begun = _Begun([request.id for request, _, _ in work], logits_SV)

    def _layout(self, work: list[Work]) -> Layout:
        return Layout.with_cache(
            [1] * len(work),
            [start for _, start, _ in work],
            [request.slot.ids[0] for request, _, _ in work if request.slot],
            [request.pages.ids for request, _, _ in work if request.pages],
            self.graphs.cache.page_size,
        )
