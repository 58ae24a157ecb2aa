"""Joins the plan of a step and the model: the only file here that knows both requests and tensors.

All work of a step lies end to end in one ragged batch, prompts and single tokens alike; the head and the sampler see
only the last token of those sequences whose next token is wanted, and the drafts behind it.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nanohybrid.engine.async_decode import AheadDecoder
from nanohybrid.engine.penalties import Written
from nanohybrid.engine.prompt_lookup import MOST_DRAFT_TOKENS
from nanohybrid.engine.request import Request
from nanohybrid.engine.sampler import Drawn, Rows, Sampled, draw, sent
from nanohybrid.engine.sanitizer import Guard
from nanohybrid.engine.scheduler import Freed, Move, Work
from nanohybrid.estimate.serving import transient
from nanohybrid.executors import TorchExecutor, executor_for
from nanohybrid.executors.cuda_graphs import Capture, GraphExecutor, cuda_graph, graphs_apply
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.model.cache import OffloadedCache
from nanohybrid.ops.sizes import CHUNK


class Runner:
    """Runs steps of one model over one allocation of state."""

    def __init__(
        self,
        model: HybridLM,
        *,
        slots: int,
        pages: int,
        page_size: int,
        deterministic: bool = False,
        state_dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        debug: bool = False,
        context: int | None = None,
        capture: Capture | None = None,
    ) -> None:
        """`context`: tokens that a sequence may reach, all pages if None. `capture`: how decode steps are recorded (graphs.py),
        as CUDA graphs where they apply if None."""
        self.model = model
        self.page_size, self.deterministic = page_size, deterministic
        self.device = model.device
        plain = state_dtype is None and kv_dtype is None  # the kernels know no other way to keep a state
        capture = cuda_graph if capture is None and plain and graphs_apply(model) else capture
        spare = int(capture is not None)  # a slot and a page for the rows that fill up a graph
        self.state = HybridCache.allocate(
            model.config,
            slots + spare,
            pages + spare,
            page_size,
            model.dtype,
            model.device,
            state_dtype,
            kv_dtype,
        )
        self.executor = executor_for(model, self.state)
        self.decoder: AheadDecoder | None = None
        if capture is not None:
            graphs = GraphExecutor(
                TorchExecutor(model, self.state),
                most_rows=slots,
                context=context or pages * page_size,
                capture=capture,
            )
            graphs.self_test()
            self.decoder = AheadDecoder(graphs)
        self.guard = Guard(self.state) if debug else None
        self._rows: dict[tuple[int, ...], Rows] = {}  # by the requests that they describe
        self._drafts: dict[
            int, int
        ] = {}  # of this step: where the logits after each request's first draft stand in `_logits_DV`
        self._logits_DV = torch.empty(0)
        self._windows: list[Request] = []
        self._alone: dict[int, Rows] = {}  # in deterministic runs, each request's own

    @torch.inference_mode()
    def run(self, work: list[Work]) -> tuple[list[Request], Sampled]:
        """Compute this work; one token for each request whose known tokens are all computed now, in order.

        Of a family that shares a prompt, all take their first token from its one row of logits. Where a request has a draft,
        `sample_draft` goes on from there, and `settle` must end the step.
        """
        for request, start, _ in work:
            if start == 0 and request.slot is not None:
                self._give(request, request.slot.ids[0], request.slot.generation)
            if self.guard is not None:
                self.guard.used(request)
        if self.deterministic:
            return self._run_each_alone(work)
        ready: list[Request] = []
        wanted: list[int] = []  # of this work, once for each request that takes its next token from it
        for index, (request, start, length) in enumerate(work):
            if start + length - len(request.draft) == request.known:
                members = request.family or [request]
                ready += members
                wanted += [index] * len(members)
        logits_SV = self._logits(work, wanted)
        if not ready:
            return ready, Sampled([], None, [])
        drawn = self._draw(logits_SV, ready, self._rows_of(ready))
        if self.decoder is not None:
            self.decoder.begin_next(work, drawn)
        return ready, drawn.fetch()

    def _logits(self, work: list[Work], wanted: list[int]) -> Tensor:
        """Logits [len(wanted), V] after these of the work: by the decoder, where there is one and it takes them, else by the forward."""
        single = (
            []
            if self.decoder is None
            else [index for index, item in enumerate(work) if self.decoder.takes(item)]
        )
        if self.decoder is None or not single:
            return self._forward(work, wanted)
        logits_SV = self.decoder.logits([work[index] for index in single])
        if wanted == single == list(range(len(work))):
            return logits_SV
        others = [index for index in range(len(work)) if index not in single]
        wanted_of_others = [index for index in wanted if index not in single]
        if others:
            others_SV = self._forward(
                [work[index] for index in others], [others.index(index) for index in wanted_of_others]
            )
            logits_SV = torch.cat([logits_SV, others_SV]) if wanted_of_others else logits_SV
        row = {index: place for place, index in enumerate([*single, *wanted_of_others])}
        return logits_SV[sent([row[index] for index in wanted], self.device)]

    def _forward(self, work: list[Work], wanted: list[int]) -> Tensor:
        """Logits [len(wanted), V] after the last token, drafts aside, of these; those after drafts are kept for `sample_draft`."""
        tokens: list[int] = []
        last: list[int] = []
        drafted: list[int] = []
        for request, start, length in work:
            tokens += request.slice(start, length)
            last.append(len(tokens) - 1 - len(request.draft))
            if request.draft:
                self._drafts[request.id] = len(drafted)
                drafted += range(last[-1] + 1, len(tokens))
        rows = [last[index] for index in wanted] + drafted
        ascending = rows if len(rows) == 1 else sorted(set(rows))
        tokens_T = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        hidden_TE, logits_SV = self.executor.run(tokens_T, self._layout(work), ascending)
        self._score(work, hidden_TE)
        if rows != ascending:  # a family takes its first tokens from one row, and drafts' rows come last
            place = {row: at for at, row in enumerate(ascending)}
            logits_SV = logits_SV[
                torch.tensor([place[row] for row in rows], dtype=torch.int64, device=self.device)
            ]
        self._logits_DV = logits_SV[len(wanted) :]
        return logits_SV[: len(wanted)]

    @torch.inference_mode()
    def sample_draft(self, requests: list[Request], offset: int) -> Sampled:
        """The token of each of these after the first `offset` of its draft, which it has said."""
        rows = [self._drafts[request.id] + offset - 1 for request in requests]
        return self._sample(self._logits_DV[torch.tensor(rows, device=self.device)], requests)

    @torch.inference_mode()
    def settle(self, stay: dict[int, int]) -> None:
        """Of the requests with drafts in this step, keep the states after so many tokens of those named, by id."""
        rows = [row for row, request in enumerate(self._windows) if request.id in stay]
        self.executor.commit(rows, [stay[self._windows[row].id] for row in rows])
        self._windows, self._logits_DV = [], torch.empty(0)
        self._drafts.clear()

    def _sample(self, logits_SV: Tensor, ready: list[Request]) -> Sampled:
        return self._draw(logits_SV, ready, self._rows_of(ready)).fetch()

    def _draw(self, logits_SV: Tensor, ready: list[Request], rows: Rows) -> Drawn:
        forced = [(row, request.forced[0]) for row, request in enumerate(ready) if request.forced]
        masks = []
        for row, request in enumerate(ready):
            if request.constrained and (allowed_V := request.allowed_tokens(logits_SV.shape[1])) is not None:
                masks.append((row, allowed_V))
        return draw(logits_SV, rows, [request.known for request in ready], forced, masks)

    def _each_alone(self, work: list[Work]) -> list[Tensor]:
        """Logits [1, V] of each whose next token is wanted, of the bits that it has alone. Where the model computes everybody as if
        alone, all go through it together."""
        wanted = [
            index for index, (request, start, length) in enumerate(work) if start + length == request.known
        ]
        result = [torch.empty(0)] * len(work)
        if self.executor.is_batch_invariant:
            logits_SV = self._logits(work, wanted)
            for index, row_V in zip(wanted, logits_SV, strict=True):
                result[index] = row_V[None].clone()  # a copy stands where all copies do, aligned alike
            return result
        for index, (request, start, length) in enumerate(work):
            for begin, end in pieces(start, start + length):
                result[index] = self._logits(
                    [Work(request, begin, end - begin)], [0] if end == request.known else []
                )
        return result

    def _run_each_alone(self, work: list[Work]) -> tuple[list[Request], Sampled]:
        """The same, each request by itself, its prompt in pieces that end at multiples of 128: what is computed for it has one
        shape whatever shares the step and however its prompt was cut, cached or put aside, and so the same bits."""
        ready: list[Request] = []
        each: list[Sampled] = []
        alone: dict[int, Rows] = {}
        for (request, start, length), logits_SV in zip(work, self._each_alone(work), strict=True):
            if start + length < request.known:
                continue
            for member in request.family or [request]:
                rows = self._alone.get(member.id) or self._make_rows([member])
                alone[member.id] = rows
                ready.append(member)
                each.append(self._draw(logits_SV, [member], rows).fetch())
        self._alone = alone
        return ready, joined(each)

    @torch.inference_mode()
    def move(self, moves: list[Move | Freed]) -> None:
        """Copy states and pages to or from host memory."""
        for move in moves:
            if isinstance(move, Freed):
                if self.guard is not None:
                    self.guard.freed(move.slot, move.pages)
                continue
            request, slot, pages, to_host = move
            if to_host:
                request.saved = self.save(request, slot, pages)
                continue
            if self.guard is not None and request.slot is not None:
                self.guard.given(request, slot, request.slot.generation)
                self.guard.pages(request, pages, request.slot.generation)
            if not isinstance(request.saved, OffloadedCache):
                raise RuntimeError(
                    f"request {request.id} has computed {request.computed} tokens and no copy of their state"
                )
            self.state.load(request.saved, slot, pages)
            request.saved = None

    @torch.inference_mode()
    def save(self, request: Request, slot: int, pages: tuple[int, ...]) -> OffloadedCache:
        """A copy of what the request's computed tokens left behind, sharing the copies of full pages that it has."""
        saved = self.state.save(slot, pages[: -(-request.computed // self.page_size)], request.kept)
        request.kept = saved.pages[: request.computed // self.page_size]
        return saved

    def reset(self, pages: Sequence[int]) -> None:
        """Forget all that belongs to requests, after a step that raised; `pages` are those that requests held."""
        self._rows.clear()
        self._drafts.clear()
        self._alone.clear()
        self._windows, self._logits_DV = [], torch.empty(0)
        if self.decoder is not None:
            self.decoder.reset()
        if self.guard is not None:
            self.guard = Guard(self.state)
        else:
            self.scrub(tuple(pages))

    @torch.inference_mode()
    def scrub(self, pages: tuple[int, ...]) -> None:
        """Zero the pages of a request whose numbers broke: the next owner's masked rows are multiplied by zero, which NaN survives."""
        self.state.fill((), pages, 0.0)

    def reserve(self, tokens: int) -> None:
        """Have the memory that a step of so many tokens takes at most, and give it back for the step to find. Raises what torch
        raises where there is not so much: here, where nothing has been written yet, and not in the middle of the layers."""
        torch.empty(transient(self.model.config, tokens), dtype=torch.uint8, device=self.device)

    def _give(self, request: Request, slot: int, generation: int) -> None:
        """A slot is zeroed when it is given, though the forward takes what begins for zeros in any case."""
        if self.guard is not None:
            self.guard.given(request, slot, generation)
        else:
            self.state.fill([slot], (), 0.0)

    def _score(self, work: list[Work], hidden_TE: Tensor) -> None:
        """Score the prompts of those that asked for it."""
        at = 0
        for request, start, length in work:
            if request.scores is not None and start + 1 < len(request.prompt):
                request.scores.take(self.model, hidden_TE[at : at + length], start)
            at += length

    def _layout(self, work: list[Work]) -> Layout:
        windows = [index for index, (request, _, _) in enumerate(work) if request.draft]
        self._windows = [work[index].request for index in windows]
        return Layout.with_cache(
            [length for _, _, length in work],
            [start for _, start, _ in work],
            [request.slot.ids[0] for request, _, _ in work if request.slot],
            [request.pages.ids for request, _, _ in work if request.pages],
            self.page_size,
            windows,
            [request.seed for request, _, _ in work],
        )

    def _rows_of(self, ready: list[Request]) -> Rows:
        key = tuple(request.id for request in ready)
        if key not in self._rows:
            if (
                len(self._rows) > MOST_DRAFT_TOKENS
            ):  # a few, since the positions of a draft have fewer and fewer requests each
                self._rows.clear()
            self._rows[key] = self._make_rows(ready)
        return self._rows[key]

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
