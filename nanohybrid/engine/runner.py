"""Joins the plan of a step and the model: the only file here that knows both requests and tensors.

All work of a step lies end to end in one ragged batch, prompts and single tokens alike; the head and the sampler see
only the last token of those sequences whose next token is wanted.
"""

from itertools import pairwise

import torch
from torch import Tensor

from nanohybrid.engine.penalties import Written
from nanohybrid.engine.request import Request
from nanohybrid.engine.sampler import Rows, Sampled, sample
from nanohybrid.engine.scheduler import Move, Work
from nanohybrid.model import HybridLM, Layout, State
from nanohybrid.model.state import Saved
from nanohybrid.ops.sizes import CHUNK


class Runner:
    """Runs steps of one model over one allocation of state."""

    def __init__(self, model: HybridLM, *, slots: int, pages: int, page_size: int, deterministic: bool = False) -> None:
        self.model = model
        self.page_size, self.deterministic = page_size, deterministic
        weight = model.head_weight
        self.device = weight.device
        self.state = State.allocate(model.config, slots, pages, page_size=page_size, dtype=weight.dtype, device=weight.device)
        self._sampled: list[Request] = []  # the requests that `_rows` describes
        self._rows = Rows([], [])
        self._alone: dict[int, Rows] = {}  # in deterministic runs, each request's own

    @torch.inference_mode()
    def run(self, work: list[Work]) -> tuple[list[Request], Sampled]:
        """Compute this work; one token for each request whose known tokens are all computed now, in order.

        Of a family that shares a prompt, all take their first token from its one row of logits.
        """
        if self.deterministic:
            return self._run_each_alone(work)
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
        self._score(work, hidden_TE)
        if not last:
            return ready, Sampled([], None, [])
        hidden_SE = hidden_TE if plain and len(last) == len(tokens) else hidden_TE[torch.tensor(last, device=self.device)]
        forced = [(row, request.forced[0]) for row, request in enumerate(ready) if request.forced]
        rows = self._edited(self._rows_of(ready), ready)
        return ready, sample(self.model.head(hidden_SE), rows, [request.known for request in ready], forced)

    def _run_each_alone(self, work: list[Work]) -> tuple[list[Request], Sampled]:
        """The same, each request by itself, its prompt in pieces that end at multiples of 128: what is computed for it has one
        shape whatever shares the step and however its prompt was cut, cached or put aside, and so the same bits."""
        ready: list[Request] = []
        each: list[Sampled] = []
        alone: dict[int, Rows] = {}
        for request, start, length in work:
            hidden_TE = torch.empty(0)
            for begin, end in pieces(start, start + length):
                tokens = torch.tensor(request.slice(begin, end - begin), device=self.device)
                piece = [Work(request, begin, end - begin)]
                hidden_TE = self.model.hidden(tokens, self._layout(piece), self.state)
                self._score(piece, hidden_TE)
            if start + length < request.known:
                continue
            logits_SV = self.model.head(hidden_TE[-1:].clone())  # a copy stands where all copies do, aligned alike
            for member in request.family or [request]:
                rows = self._alone.get(member.id) or self._make_rows([member])
                alone[member.id] = rows
                ready.append(member)
                forced = [(0, member.forced[0])] if member.forced else []
                each.append(sample(logits_SV, self._edited(rows, [member]), [member.known], forced))
        self._alone = alone
        return ready, joined(each)

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

    def _score(self, work: list[Work], hidden_TE: Tensor) -> None:
        """Score the prompts of those that asked for it."""
        at = 0
        for request, start, length in work:
            if request.scores is not None and start + 1 < len(request.prompt):
                request.scores.take(self.model, hidden_TE[at : at + length], start)
            at += length

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
            self._rows = self._make_rows(ready)
        return self._rows

    def _edited(self, rows: Rows, ready: list[Request]) -> Rows:
        """What a subclass makes of the rows of a step before they are sampled."""
        return rows

    def _make_rows(self, ready: list[Request]) -> Rows:
        return Rows(
            [request.params for request in ready],
            [request.seed for request in ready],
            self.device,
            [Written(request.prompt, request.tokens) for request in ready],
        )


def pieces(start: int, end: int) -> list[tuple[int, int]]:
    """The stretch from `start` to `end`, cut at multiples of 128."""
    cuts = [start, *range((start // CHUNK + 1) * CHUNK, end, CHUNK), end]
    return list(pairwise(cuts))


def joined(each: list[Sampled]) -> Sampled:
    """What was sampled row by row as if it had been sampled together."""
    some_logprobs, some_top = any(one.logprobs for one in each), any(one.top for one in each)
    return Sampled(
        [one.tokens[0] for one in each],
        [one.logprobs[0] if one.logprobs else 0.0 for one in each] if some_logprobs else None,
        [row for row, one in enumerate(each) if one.broken],
        [one.top[0] if one.top else [] for one in each] if some_top else None,
    )
