"""The engine: requests in, tokens out. A step is schedule, run, postprocess.

    engine = Engine(model, tokenizer)
    completions = engine.generate(prompts, SamplingParams(max_tokens=64))

Beneath `generate` and `stream` lie `add`, `step` and `cancel`, from which a server makes its own loop.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence

from nanohybrid.engine.params import Completion, SamplingParams
from nanohybrid.engine.pools import PagePool, SlotPool
from nanohybrid.engine.request import Request
from nanohybrid.engine.runner import Runner
from nanohybrid.engine.sampler import Sampled
from nanohybrid.engine.scheduler import Scheduler, Work
from nanohybrid.errors import NanohybridError
from nanohybrid.model import HybridLM
from nanohybrid.text import Tokenizer

PAGE = 128  # tokens a KV page holds: one Mamba chunk


class Engine:
    """One model, one tokenizer, the memory of `max_running` sequences of at most `max_context` tokens each.

    `pages` overcommits or saves memory: so many KV pages of 128 tokens instead of enough for all at full length.
    `token_budget` bounds the tokens of a step, and so its transient memory and how long a prompt delays the others.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        max_running: int = 64,
        max_context: int = 4096,
        token_budget: int = 2048,
        pages: int | None = None,
    ) -> None:
        pages = max_running * -(-max_context // PAGE) if pages is None else pages
        self.model, self.tokenizer = model, tokenizer
        self.scheduler = Scheduler(
            SlotPool(max_running), PagePool(pages), page_size=PAGE, max_context=max_context, token_budget=token_budget
        )
        self.runner = Runner(model, slots=max_running, pages=pages, page_size=PAGE)
        self._eos = tokenizer.stop_ids | {model.config.eos_token_id}
        self._next_id = 0

    @classmethod
    def sized_for(
        cls, model: HybridLM, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], max_tokens: int, max_running: int = 64
    ) -> "Engine":
        """An engine with no more memory than this job needs, and no more context than the model was made for."""
        longest = max((len(prompt) for prompt in prompts), default=1)
        context = min(longest + max_tokens, model.config.max_position_embeddings)
        return cls(model, tokenizer, max_running=max(1, min(max_running, len(prompts))), max_context=context)

    def step(self) -> list[Request]:
        """Advance every running request; returns those that took a token (some are `finished` now)."""
        work = self.scheduler.schedule()
        sampled = self.runner.run(work)
        return self._postprocess(work, sampled)

    def add(self, prompt: Sequence[int], params: SamplingParams, stream: bool = False) -> Request:
        """Queue a prompt of ids. Raises InputError where it is longer than the engine's context."""
        request = Request(
            self._next_id,
            list(prompt),
            params,
            self.tokenizer,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            stop_ids=frozenset() if params.ignore_eos else self._eos,
            stream=stream,
        )
        self.scheduler.add(request)
        self._next_id += 1
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request, wherever it is; its slot and pages are free at once. A finished one is left as it is."""
        if not request.finished:
            request.cancelled = True
            self.scheduler.remove(request)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Callable[[int], object] | None = None,
    ) -> list[Completion]:
        """Complete all prompts, in their order. `progress` is told how many more are finished.

        One `params` serves every prompt, its seed too: equal prompts then get equal texts; give a list for different ones.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(each)} sampling parameters")
        requests: list[Request] = []
        try:
            for prompt, wanted in zip(prompts, each, strict=True):
                requests.append(self.add(prompt, wanted))
            while self.busy:
                done = sum(request.finished for request in self.step())
                if progress is not None and done:
                    progress(done)
        finally:
            for request in requests:
                self.cancel(request)
        return [completed(request) for request in requests]

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[str]:
        """Yield the text piece by piece; closing the iterator cancels the request."""
        request = self.add(prompt, params, stream=True)
        try:
            while not request.finished:
                self.step()
                if text := request.take_text():
                    yield text
        finally:
            self.cancel(request)
        completed(request)

    def _postprocess(self, work: list[Work], sampled: Sampled) -> list[Request]:
        tokens, logprobs = iter(sampled.tokens), sampled.logprobs
        advanced: list[Request] = []
        for request, start, length in work:
            request.computed = end = start + length
            if end < request.known:
                continue
            row = len(advanced)
            advanced.append(request)
            if request.accept(next(tokens), None if logprobs is None else logprobs[row]):
                self.scheduler.remove(request)
        for row in sampled.broken:
            if not advanced[row].finished:
                self.scheduler.remove(advanced[row])
            advanced[row].finish_reason = "error"
        return advanced


def completed(request: Request) -> Completion:
    """What came of a finished request. Raises NanohybridError where the model's logits were not numbers."""
    completion = request.completion()
    if completion.finish_reason == "error":
        raise NanohybridError(
            f"the model's logits are not numbers after {len(completion.token_ids)} tokens; was the checkpoint trained without diverging?"
        )
    return completion
