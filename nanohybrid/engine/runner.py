"""Joins the plan of a step and the model: the only file here that knows both requests and tensors.

All work of a step lies end to end in one ragged batch, prompts and single tokens alike; the head and the sampler see
only the last token of those sequences whose next token is wanted.
"""

import torch

from nanohybrid.engine.penalties import Written
from nanohybrid.engine.request import Request
from nanohybrid.engine.sampler import Rows, Sampled, sample
from nanohybrid.engine.scheduler import Move, Work
from nanohybrid.model import HybridLM, Layout, State
from nanohybrid.model.state import Saved


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
    def run(self, work: list[Work]) -> tuple[list[Request], Sampled]:
        """Compute this work; one token for each request whose known tokens are all computed now, in order.

        Of a family that shares a prompt, all take their first token from its one row of logits.
        """
        tokens: list[int] = []
        last: list[int] = []
        ready: list[Request] = []
        plain = True
        for request, start, length in work:
            tokens += request.slice(start, length) if length > 1 or not request.tokens else request.tokens[-1:]
            if start + length == request.known:
                if request.family is None:
                    ready.append(request)
                    last.append(len(tokens) - 1)
                else:
                    plain = False
                    ready += request.family
                    last += [len(tokens) - 1] * len(request.family)
        hidden_TE = self.model.hidden(torch.tensor(tokens, device=self.device), self._layout(work), self.state)
        if not last:
            return ready, Sampled([], None, [])
        hidden_SE = hidden_TE if plain and len(last) == len(tokens) else hidden_TE[torch.tensor(last, device=self.device)]
        forced = [(row, request.forced[0]) for row, request in enumerate(ready) if request.forced]
        return ready, sample(self.model.head(hidden_SE), self._rows_of(ready), [request.known for request in ready], forced)

    @torch.inference_mode()
    def move(self, moves: list[Move]) -> None:
        """Copy states and pages to or from host memory."""
        for request, slot, pages, to_host in moves:
            if to_host:
                request.saved = self.save(request, slot, pages)
                continue
            if not isinstance(request.saved, Saved):
                raise RuntimeError(f"request {request.id} has computed {request.computed} tokens and no copy of their state")
            self.state.load(request.saved, slot, pages)
            request.saved = None

    @torch.inference_mode()
    def save(self, request: Request, slot: int, pages: tuple[int, ...]) -> Saved:
        """A copy of what the request's computed tokens left behind, sharing the copies of full pages that it has."""
        saved = self.state.save(slot, pages[: -(-request.computed // self.page_size)], request.kept)
        request.kept = saved.pages[: request.computed // self.page_size]
        return saved

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
            self._rows = Rows(
                [request.params for request in ready],
                [request.seed for request in ready],
                self.device,
                [Written(request.prompt, request.tokens) for request in ready],
            )
        return self._rows
