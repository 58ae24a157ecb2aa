"""Joins the plan of a step and the model: the only file here that knows both requests and tensors.

All work of a step lies end to end in one ragged batch, prompts and single tokens alike; the head and the sampler see
only the last token of those sequences whose next token is wanted.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanohybrid.engine.penalties import Written
from nanohybrid.engine.request import Request
from nanohybrid.engine.sampler import Rows, Sampled, sample
from nanohybrid.engine.scheduler import Move, Work
from nanohybrid.model import HybridLM, Layout, State
from nanohybrid.model.packed import is_packed
from nanohybrid.model.state import Saved
from nanohybrid.ops.sizes import CHUNK

if TYPE_CHECKING:
    from nanohybrid.model.decoder import Decoder


class Runner:
    """Runs steps of one model over one allocation of state."""

    def __init__(self, model: HybridLM, *, slots: int, pages: int, page_size: int, deterministic: bool = False) -> None:
        self.model = model
        self.page_size, self.deterministic = page_size, deterministic
        self.device = model.device
        self.state = State.allocate(model.config, slots, pages, page_size=page_size, dtype=model.dtype, device=model.device)
        self.decoder = make_decoder(model, self.state)
        self._sampled: list[Request] = []  # the requests that `_rows` describes
        self._rows = Rows([], [])
        self._alone: dict[int, Rows] = {}  # in deterministic runs, each request's own

    @torch.inference_mode()
    def run(self, work: list[Work]) -> tuple[list[Request], Sampled]:
        """Compute this work; one token for each request whose known tokens are all computed now.

        Of a family that shares a prompt, all take their first token from its one row of logits.
        """
        if self.deterministic:
            return self._run_each_alone(work)
        single, longer = _parted(work, self.decoder is not None)
        ready: list[Request] = []
        logits: list[Tensor] = []
        for some, compute in ((single, self._step), (longer, self._forward)):
            if some:
                wanted: list[int] = []  # of this work, once for each request that takes its next token from it
                for index, (request, start, length) in enumerate(some):
                    if start + length == request.known:
                        members = request.family or [request]
                        ready += members
                        wanted += [index] * len(members)
                logits_SV = compute(some, wanted)
                if wanted:
                    logits.append(logits_SV)
        if not ready:
            return ready, Sampled([], None, [])
        forced = [(row, request.forced[0]) for row, request in enumerate(ready) if request.forced]
        logits_SV = logits[0] if len(logits) == 1 else torch.cat(logits)
        rows = self._edited(self._rows_of(ready), ready)
        return ready, sample(logits_SV, rows, [request.known for request in ready], forced)

    def _forward(self, work: list[Work], wanted: list[int]) -> Tensor:
        """Work of any lengths through the ragged forward; logits [len(wanted), V] after the last token of these."""
        tokens: list[int] = []
        last: list[int] = []
        for request, start, length in work:
            tokens += request.slice(start, length)
            last.append(len(tokens) - 1)
        hidden_TE = self.model.hidden(torch.tensor(tokens, device=self.device), self._layout(work), self.state)
        if len(tokens) == len(wanted) == len(work):  # each brought one, each once
            return self.model.head(hidden_TE)
        return self.model.head(hidden_TE[torch.tensor([last[index] for index in wanted], dtype=torch.int64, device=self.device)])

    def _step(self, work: list[Work], wanted: list[int]) -> Tensor:
        """The same for one token of each, through the decoder's one kernel."""
        assert self.decoder is not None
        tokens = [request.slice(start, 1)[0] for request, start, _ in work]
        logits_SV = self.decoder.logits(tokens, self._layout(work))
        return logits_SV if wanted == list(range(len(work))) else logits_SV[wanted]

    def _run_each_alone(self, work: list[Work]) -> tuple[list[Request], Sampled]:
        """The same, each request by itself, its prompt in pieces that end at multiples of 128: what is computed for it has one
        shape whatever shares the step and however its prompt was cut, cached or put aside, and so the same bits. Single tokens
        go through the decoder together, where there is one: it computes each as if alone."""
        ready: list[Request] = []
        each: list[Sampled] = []
        alone: dict[int, Rows] = {}
        single, longer = _parted(work, self.decoder is not None)
        rows = list(self._step(single, list(range(len(single)))).split(1)) if single else []
        for work_of_one in longer:
            rows.append(self._pieces(work_of_one))
        for (request, start, length), logits_SV in zip([*single, *longer], rows, strict=True):
            if start + length < request.known:
                continue
            for member in request.family or [request]:
                drawn = self._alone.get(member.id) or self._make_rows([member])
                alone[member.id] = drawn
                ready.append(member)
                forced = [(0, member.forced[0])] if member.forced else []
                # a copy stands where all copies do, aligned alike
                each.append(sample(logits_SV.clone(), self._edited(drawn, [member]), [member.known], forced))
        self._alone = alone
        return ready, joined(each)

    def _pieces(self, work: Work) -> Tensor:
        """Logits [1, V] after the last token of one request's work, computed piece by piece; a piece of one token as any such is."""
        request, start, length = work
        logits_SV = torch.empty(0)
        for begin, end in pieces(start, start + length):
            piece = [Work(request, begin, end - begin)]
            wanted = [0] if end == request.known else []
            if self.decoder is not None and end - begin == 1:
                logits_SV = self._step(piece, [0])
            else:
                logits_SV = self._forward(piece, wanted)
        return logits_SV

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


def make_decoder(model: HybridLM, state: State) -> "Decoder | None":
    """The one-kernel decode step, for a model that was packed for it (nanohybrid.model.packed.prepare)."""
    if not is_packed(model):
        return None
    from nanohybrid.model.decoder import Decoder  # here, since it needs numba

    return Decoder(model, state)


def _parted(work: list[Work], decoder: bool) -> tuple[list[Work], list[Work]]:
    """What the decoder computes, one token each, and the rest."""
    if not decoder:
        return [], work
    return [item for item in work if item.length == 1], [item for item in work if item.length > 1]


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
