"""Runs the work of a step on the model: the only file of the engine that knows both requests and tensors.

All tokens of a step are laid end to end in one ragged batch, those of prompts and those of decoding requests.
The output head and the sampler see only the last token of each sequence whose next token is needed, and its
draft.

S sequences or rows · T tokens of the step · D drafted tokens · E hidden width · V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nanohybrid.engine.async_decode import AsyncDecoder
from nanohybrid.engine.penalties import TokenHistory
from nanohybrid.engine.prompt_lookup import MOST_DRAFT_TOKENS
from nanohybrid.engine.request import Request
from nanohybrid.engine.sampler import Sampled, SampleFuture, SamplingMetadata, sample_async, to_device
from nanohybrid.engine.sanitizer import CacheSanitizer
from nanohybrid.engine.scheduler import Freed, Swap, Work
from nanohybrid.estimate.serving import transient
from nanohybrid.executors import TorchExecutor, executor_for
from nanohybrid.executors.cuda_graphs import Capture, GraphExecutor, cuda_graph, graphs_apply
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.model.cache import OffloadedCache
from nanohybrid.ops.sizes import CHUNK


class Runner:
    """Runs steps of one model over one cache.

    slots, pages, page_size: of the cache.
    context: tokens of the longest sequence; None: as many as all pages hold.
    capture: how decode steps are recorded (executors/cuda_graphs.py); None: as CUDA graphs where they apply.
    debug: check every use of the cache (sanitizer.py).
    """

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
        self.model = model
        self.page_size, self.deterministic = page_size, deterministic
        self.device = model.device
        plain = state_dtype is None and kv_dtype is None  # the decode kernels know no other precision
        capture = cuda_graph if capture is None and plain and graphs_apply(model) else capture
        spare = int(capture is not None)  # a slot and a page for the rows that pad a graph
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
        self.decoder: AsyncDecoder | None = None
        if capture is not None:
            graphs = GraphExecutor(
                TorchExecutor(model, self.state),
                most_rows=slots,
                context=context or pages * page_size,
                capture=capture,
            )
            graphs.self_test()
            self.decoder = AsyncDecoder(graphs)
        self.sanitizer = CacheSanitizer(self.state) if debug else None
        self._metadata: dict[tuple[int, ...], SamplingMetadata] = {}  # by the ids of its requests
        # The logits after drafted tokens of this step, and by request id the row of its first one.
        self._logits_DV = torch.empty(0)
        self._drafts: dict[int, int] = {}
        self._drafting: list[Request] = []
        self._own_metadata: dict[int, SamplingMetadata] = {}  # of each request, where it runs by itself

    @torch.inference_mode()
    def run(self, work: list[Work]) -> tuple[list[Request], Sampled]:
        """Compute this work. Returns the requests whose known tokens are all computed, and a token for each.

        All requests of a group sample their first token from the same row of logits. Where requests have
        drafts, `sample_draft` continues from there, and `commit` must end the step.
        """
        for request, start, _ in work:
            if start == 0 and request.slot is not None:
                self._clear_slot(request, request.slot.ids[0], request.slot.generation)
            if self.sanitizer is not None:
                self.sanitizer.on_use(request)
        if self.deterministic:
            return self._run_deterministic(work)
        ready: list[Request] = []
        wanted: list[int] = []  # indices of work, one for each request that samples its next token there
        for index, (request, start, length) in enumerate(work):
            if start + length - len(request.draft) == request.num_tokens:
                members = request.group or [request]
                ready += members
                wanted += [index] * len(members)
        logits_SV = self._logits(work, wanted)
        if not ready:
            return ready, Sampled([], None, [])
        future = self._sample_async(logits_SV, ready, self._metadata_of(ready))
        if self.decoder is not None:
            self.decoder.prefetch_next(work, future)
        return ready, future.fetch()

    def _logits(self, work: list[Work], wanted: list[int]) -> Tensor:
        """Logits [len(wanted), V] after the work of these indices.

        Computed by the decoder where there is one and it supports the work, else by the ragged forward.
        """
        single = (
            []
            if self.decoder is None
            else [index for index, item in enumerate(work) if self.decoder.supports(item)]
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
        row = {index: at for at, index in enumerate([*single, *wanted_of_others])}
        return logits_SV[to_device([row[index] for index in wanted], self.device)]

    def _forward(self, work: list[Work], wanted: list[int]) -> Tensor:
        """Logits [len(wanted), V] after the last known token of the work of these indices.

        The logits after drafted tokens are stored for `sample_draft`.
        """
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
        if rows != ascending:  # a group samples from one row, and the rows of drafts come last
            place = {row: at for at, row in enumerate(ascending)}
            logits_SV = logits_SV[
                torch.tensor([place[row] for row in rows], dtype=torch.int64, device=self.device)
            ]
        self._logits_DV = logits_SV[len(wanted) :]
        return logits_SV[: len(wanted)]

    @torch.inference_mode()
    def sample_draft(self, requests: list[Request], offset: int) -> Sampled:
        """The next token of each request after the first `offset` tokens of its draft, which it accepted."""
        rows = [self._drafts[request.id] + offset - 1 for request in requests]
        return self._sample(self._logits_DV[torch.tensor(rows, device=self.device)], requests)

    @torch.inference_mode()
    def commit(self, accepted: dict[int, int]) -> None:
        """End a step with drafts: roll each state back to after the accepted tokens.

        accepted: tokens of this step to keep, by the id of the request; requests that are not named have
            ended.
        """
        rows = [row for row, request in enumerate(self._drafting) if request.id in accepted]
        self.executor.commit(rows, [accepted[self._drafting[row].id] for row in rows])
        self._drafting, self._logits_DV = [], torch.empty(0)
        self._drafts.clear()

    def _sample(self, logits_SV: Tensor, ready: list[Request]) -> Sampled:
        return self._sample_async(logits_SV, ready, self._metadata_of(ready)).fetch()

    def _sample_async(
        self, logits_SV: Tensor, ready: list[Request], metadata: SamplingMetadata
    ) -> SampleFuture:
        forced = [(row, request.forced[0]) for row, request in enumerate(ready) if request.forced]
        masks = []
        for row, request in enumerate(ready):
            if request.constrained and (allowed_V := request.allowed_tokens(logits_SV.shape[1])) is not None:
                masks.append((row, allowed_V))
        return sample_async(logits_SV, metadata, [request.num_tokens for request in ready], forced, masks)

    def _logits_each_alone(self, work: list[Work]) -> list[Tensor]:
        """Logits [1, V] of each request whose next token is needed, with the bits that it has alone.

        Where the executor is batch-invariant, all are computed together.
        """
        wanted = [
            index
            for index, (request, start, length) in enumerate(work)
            if start + length == request.num_tokens
        ]
        result = [torch.empty(0)] * len(work)
        if self.executor.is_batch_invariant:
            logits_SV = self._logits(work, wanted)
            for index, row_V in zip(wanted, logits_SV, strict=True):
                result[index] = row_V[None].clone()  # every copy has the same alignment in memory
            return result
        for index, (request, start, length) in enumerate(work):
            for begin, end in chunks(start, start + length):
                result[index] = self._logits(
                    [Work(request, begin, end - begin)], [0] if end == request.num_tokens else []
                )
        return result

    def _run_deterministic(self, work: list[Work]) -> tuple[list[Request], Sampled]:
        """The same as `run`, but each request by itself, its prompt in chunks that end at multiples of 128.

        What is computed for a request then has the same shapes, and so the same bits, whatever shares the
        step and wherever its prompt was cut, cached or preempted.
        """
        ready: list[Request] = []
        each: list[Sampled] = []
        alone: dict[int, SamplingMetadata] = {}
        for (request, start, length), logits_SV in zip(work, self._logits_each_alone(work), strict=True):
            if start + length < request.num_tokens:
                continue
            for member in request.group or [request]:
                metadata = self._own_metadata.get(member.id) or self._make_metadata([member])
                alone[member.id] = metadata
                ready.append(member)
                each.append(self._sample_async(logits_SV, [member], metadata).fetch())
        self._own_metadata = alone
        return ready, merged(each)

    @torch.inference_mode()
    def swap(self, swaps: list[Swap | Freed]) -> None:
        """Copy states and pages to or from host memory.

        Raises RuntimeError where there is no copy of a request that is swapped in.
        """
        for swap in swaps:
            if isinstance(swap, Freed):
                if self.sanitizer is not None:
                    self.sanitizer.on_free(swap.slot, swap.pages)
                continue
            request, slot, pages, to_host = swap
            if to_host:
                request.offloaded = self.save(request, slot, pages)
                continue
            if self.sanitizer is not None and request.slot is not None:
                self.sanitizer.on_alloc(request, slot, request.slot.generation)
                self.sanitizer.on_use_pages(request, pages, request.slot.generation)
            if not isinstance(request.offloaded, OffloadedCache):
                raise RuntimeError(
                    f"request {request.id} has computed {request.num_computed_tokens} tokens "
                    "and no copy of their state"
                )
            self.state.load(request.offloaded, slot, pages)
            request.offloaded = None

    @torch.inference_mode()
    def save(self, request: Request, slot: int, pages: tuple[int, ...]) -> OffloadedCache:
        """A copy of a request's state and pages in host memory.

        Copies of full pages that it has are shared.
        """
        saved = self.state.save(
            slot, pages[: -(-request.num_computed_tokens // self.page_size)], request.host_pages
        )
        request.host_pages = saved.pages[: request.num_computed_tokens // self.page_size]
        return saved

    def reset(self, pages: Sequence[int]) -> None:
        """Forget all requests, after a step that raised. pages: those that requests held."""
        self._metadata.clear()
        self._drafts.clear()
        self._own_metadata.clear()
        self._drafting, self._logits_DV = [], torch.empty(0)
        if self.decoder is not None:
            self.decoder.reset()
        if self.sanitizer is not None:
            self.sanitizer = CacheSanitizer(self.state)
        else:
            self.zero_pages(tuple(pages))

    @torch.inference_mode()
    def zero_pages(self, pages: tuple[int, ...]) -> None:
        """Zero the pages of a request with non-finite values.

        Attention multiplies the masked rows of a page by zero, and NaN times zero is NaN for the next owner.
        """
        self.state.fill((), pages, 0.0)

    def probe_memory(self, tokens: int) -> None:
        """Allocate and free the memory that a step of so many tokens needs at most.

        Raises what torch raises where there is not so much: here, before anything is written, and not in the
        middle of the layers.
        """
        torch.empty(transient(self.model.config, tokens), dtype=torch.uint8, device=self.device)

    def _clear_slot(self, request: Request, slot: int, generation: int) -> None:
        """Zero a slot as it is allocated, although the forward begins a sequence with zeros in any case."""
        if self.sanitizer is not None:
            self.sanitizer.on_alloc(request, slot, generation)
        else:
            self.state.fill([slot], (), 0.0)

    def _score(self, work: list[Work], hidden_TE: Tensor) -> None:
        """Compute the prompt log-probabilities of the requests that ask for them."""
        at = 0
        for request, start, length in work:
            if request.scores is not None and start + 1 < len(request.prompt):
                request.scores.add(self.model, hidden_TE[at : at + length], start)
            at += length

    def _layout(self, work: list[Work]) -> Layout:
        windows = [index for index, (request, _, _) in enumerate(work) if request.draft]
        self._drafting = [work[index].request for index in windows]
        return Layout.with_cache(
            [length for _, _, length in work],
            [start for _, start, _ in work],
            [request.slot.ids[0] for request, _, _ in work if request.slot],
            [request.pages.ids for request, _, _ in work if request.pages],
            self.page_size,
            windows,
            [request.seed for request, _, _ in work],
        )

    def _metadata_of(self, ready: list[Request]) -> SamplingMetadata:
        key = tuple(request.id for request in ready)
        if key not in self._metadata:
            if len(self._metadata) > MOST_DRAFT_TOKENS:  # each position of the drafts has other requests
                self._metadata.clear()
            self._metadata[key] = self._make_metadata(ready)
        return self._metadata[key]

    def _make_metadata(self, ready: list[Request]) -> SamplingMetadata:
        return SamplingMetadata(
            [request.params for request in ready],
            [request.seed for request in ready],
            self.device,
            [TokenHistory(request.prompt, request.tokens) for request in ready],
        )


def chunks(start: int, end: int) -> list[tuple[int, int]]:
    """The positions from `start` to `end` as (begin, end), cut at multiples of 128."""
    cuts = [start, *range((start // CHUNK + 1) * CHUNK, end, CHUNK), end]
    return list(pairwise(cuts))


def merged(each: list[Sampled]) -> Sampled:
    """Results that were sampled row by row as if they had been sampled together."""
    some_logprobs, some_top = any(one.logprobs for one in each), any(one.top for one in each)
    return Sampled(
        [one.tokens[0] for one in each],
        [one.logprobs[0] if one.logprobs else 0.0 for one in each] if some_logprobs else None,
        [row for row, one in enumerate(each) if one.non_finite],
        [one.top[0] if one.top else [] for one in each] if some_top else None,
    )
