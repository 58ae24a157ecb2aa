"""Joins the plan of a step and the model: the only file here that knows both requests and tensors.

All work of a step lies end to end in one ragged batch, prompts and single tokens alike; the head and the sampler see
only the last token of those sequences whose next token is wanted.
"""

import torch

from nanohybrid.engine.request import Request
from nanohybrid.engine.sampler import Rows, Sampled, sample
from nanohybrid.engine.scheduler import Work
from nanohybrid.model import HybridLM, Layout, State


class Runner:
    """Runs steps of one model over one allocation of state."""

    def __init__(self, model: HybridLM, *, slots: int, pages: int, page_size: int) -> None:
        self.model = model
        self.page_size = page_size
        weight = model.head_weight
        self.device = weight.device
        self.state = State.allocate(model.config, slots, pages, page_size=page_size, dtype=weight.dtype, device=weight.device)
        self._sampled: list[Request] = []  # the requests that `_rows` describes
        self._rows = Rows([], [])

    @torch.inference_mode()
    def run(self, work: list[Work]) -> Sampled:
        """Compute this work; one token for each piece that ends where its request's known tokens end, in order."""
        tokens: list[int] = []
        last: list[int] = []
        for request, start, length in work:
            tokens += request.slice(start, length) if length > 1 or not request.tokens else request.tokens[-1:]
            if start + length == request.known:
                last.append(len(tokens) - 1)
        hidden_TE = self.model.hidden(torch.tensor(tokens, device=self.device), self._layout(work), self.state)
        if not last:
            return Sampled([], None, [])
        ready = [request for request, start, length in work if start + length == request.known]
        hidden_SE = hidden_TE if len(last) == len(tokens) else hidden_TE[torch.tensor(last, device=self.device)]
        forced = [(row, request.forced[0]) for row, request in enumerate(ready) if request.forced]
        return sample(self.model.head(hidden_SE), self._rows_of(ready), [request.known for request in ready], forced)

    def _layout(self, work: list[Work]) -> Layout:
        return Layout.stored(
            [length for _, _, length in work],
            [start for _, start, _ in work],
            [request.slot.ids[0] for request, _, _ in work if request.slot],
            [request.pages.ids for request, _, _ in work if request.pages],
            self.page_size,
        )

    def _rows_of(self, ready: list[Request]) -> Rows:
        if ready != self._sampled:
            self._sampled = ready
            self._rows = Rows([request.params for request in ready], [request.seed for request in ready], self.device)
        return self._rows
