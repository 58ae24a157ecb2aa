"""The engine: requests in, tokens out. A step is schedule, run, postprocess.

    engine = Engine(model, tokenizer)
    completions = engine.generate(prompts, SamplingParams(max_tokens=64))

Beneath `generate` and `stream` lie `add`, `step` and `cancel`, from which a server makes its own loop.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from nanohybrid.engine.block_manager import PagePool, SlotPool
from nanohybrid.engine.config import EngineConfig
from nanohybrid.engine.oom_retry import compute
from nanohybrid.engine.parallel_sampling import choice_seed, fork, leave
from nanohybrid.engine.params import Completion, GenerationError, SamplingParams
from nanohybrid.engine.prefix_cache import PrefixCache, begin
from nanohybrid.engine.prompt_lookup import Drafter
from nanohybrid.engine.request import Request
from nanohybrid.engine.runner import Runner
from nanohybrid.engine.sampler import Sampled
from nanohybrid.engine.scheduler import Scheduler, Work
from nanohybrid.engine.scoring import PromptScores
from nanohybrid.engine.structured_output import Grammar, GrammarCompiler
from nanohybrid.engine.watchdog import Watchdog
from nanohybrid.errors import InputError, NanohybridError
from nanohybrid.model import HybridLM
from nanohybrid.model.spec import KV_DTYPES, STATE_DTYPES, known
from nanohybrid.ops.sizes import PAGE
from nanohybrid.text import Tokenizer


class Engine:
    """One model, one tokenizer, and the memory that `config` asks for, which is taken once.

    `options` are fields of EngineConfig by name, instead of or on top of `config`. Raises InputError for an option that does not
    exist or cannot be used.
    """

    def __init__(
        self, model: HybridLM, tokenizer: Tokenizer, config: EngineConfig | None = None, **options: Any
    ) -> None:
        config = EngineConfig.of(config, options)
        refusing = [mixer.label for mixer in model.config.mixers if not mixer.takes_drafts(model.config)]
        if config.num_speculative_tokens and refusing:
            raise InputError(
                f"speculative decoding cannot roll back {refusing[0]} layers: set num_speculative_tokens to 0"
            )
        max_model_len = config.longest(model.config.max_position_embeddings)
        pages = config.num_kv_pages
        pages = config.max_num_seqs * -(-max_model_len // PAGE) if pages is None else pages
        debug = config.debug
        debug = os.environ.get("NANOHYBRID_DEBUG", "") not in ("", "0") if debug is None else debug
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.scheduler = Scheduler(
            SlotPool(config.max_num_seqs),
            PagePool(pages),
            page_size=PAGE,
            max_model_len=max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            overcommit=config.overcommit,
        )
        self.scheduler.tell_freed = debug
        self.cache: PrefixCache | None = None
        if config.prefix_cache_bytes:
            self.cache = PrefixCache(config.prefix_cache_bytes, config.prefix_cache_interval)
            self.scheduler.on_admit = partial(begin, self.cache)
        self.watchdog = Watchdog(config.step_timeout)
        self.runner = Runner(
            model,
            slots=config.max_num_seqs,
            pages=pages,
            page_size=PAGE,
            deterministic=config.deterministic,
            state_dtype=STATE_DTYPES[
                known(config.mamba_ssm_cache_dtype, STATE_DTYPES, "mamba_ssm_cache_dtype")
            ],
            kv_dtype=KV_DTYPES[known(config.kv_cache_dtype, KV_DTYPES, "kv_cache_dtype")],
            debug=debug,
            context=max_model_len,
        )
        speculate = config.num_speculative_tokens
        if self.runner.decoder is not None:
            self.runner.decoder.look_ahead = not (config.overcommit or config.deterministic or speculate)
        self.drafter = Drafter(speculate) if speculate else None
        if self.drafter is not None:
            self.scheduler.propose = self.drafter.propose
        self._eos = tokenizer.stop_ids | {model.config.eos_token_id}
        self._next_id = 0

    @classmethod
    def sized_for(
        cls,
        model: HybridLM,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        config: EngineConfig | None = None,
        n: int = 1,
        **options: Any,
    ) -> "Engine":
        """An engine with no more slots and no longer sequences than this job needs and `config` allows.

        prompts: ids. max_tokens: of the longest answer. n: answers of each prompt. Sequences are no longer than the model was made
        for: `add` raises InputError for a prompt that would be.
        """
        config = EngineConfig.of(config, options)
        longest = max((len(prompt) for prompt in prompts), default=1) + max_tokens
        if config.max_model_len is not None:
            longest = min(longest, config.max_model_len)
        job = replace(
            config,
            max_num_seqs=max(1, min(config.max_num_seqs, n * len(prompts))),
            max_model_len=min(longest, model.config.max_position_embeddings),
        )
        return cls(model, tokenizer, job)

    def step(self) -> list[Request]:
        """Advance every running request; returns those that took a token (some are `finished` now)."""
        with self.watchdog:
            if not (work := self._schedule()):
                return []
            work, (ready, sampled) = compute(work, self.scheduler, self.runner, self._schedule)
            self._postprocess(work, ready, sampled)
            if self.drafter is not None:
                self._verify([request for request in ready if request.draft], self.drafter)
            return ready

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stream: bool = False,
        checkpoint_at: Sequence[int] = (),
        salt: str = "",
        grammar: Grammar | None = None,
    ) -> Request:
        """Queue a prompt of ids. Raises InputError where it is longer than the engine's context, or has ids that are none.

        `grammar`: that of `params.structured_outputs` from `compile_grammar`, where compiling it here would delay a step too long.

        `checkpoint_at`: after how many of its tokens another prompt is likely to differ (the end of system and tools; just
        before the `<think>` of the generation prompt). `salt`: only prompts of the same salt share what was computed.
        """
        if params.n != 1:
            raise ValueError("a request is one completion: add_choices makes params.n of them")
        return self.add_choices(prompt, params, stream, checkpoint_at, salt, grammar)[0]

    def add_choices(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stream: bool = False,
        checkpoint_at: Sequence[int] = (),
        salt: str = "",
        grammar: Grammar | None = None,
    ) -> list[Request]:
        """Queue `params.n` completions of one prompt, which is computed once. Each is a request of its own.

        The first has the seed itself; the others draw as separate requests with `choice_seed(seed, index)` would.
        """
        vocabulary = self.model.config.vocab_size
        if prompt and not 0 <= min(prompt) <= max(prompt) < vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise InputError(
                f"the prompt has the id {wrong}: ids of this model are from 0 to {vocabulary - 1}"
            )
        seed = secrets.randbits(64) if params.seed is None else params.seed
        if self.runner.deterministic:
            checkpoint_at = [place // PAGE * PAGE for place in checkpoint_at]
        stop_ids = frozenset() if params.ignore_eos else self._eos
        scores = (
            None if params.prompt_logprobs is None else PromptScores(list(prompt), params.prompt_logprobs)
        )
        grammar = self.compile_grammar(params) if grammar is None else grammar
        family = [
            Request(
                self._next_id + i,
                list(prompt),
                params,
                self.tokenizer,
                seed=choice_seed(seed, i),
                stop_ids=stop_ids,
                stream=stream,
                checkpoint_at=tuple(checkpoint_at),
                salt=salt,
                scores=scores,
                grammar=grammar,
            )
            for i in range(params.n)
        ]
        self.scheduler.add(family[0])
        self._next_id += params.n
        if params.n > 1:
            for request in family:
                request.family = family
            return list(family)
        return family

    def compile_grammar(self, params: SamplingParams) -> Grammar | None:
        """The compiled grammar of `params.structured_outputs`; None where there are none. May be called from any thread.

        Raises InputError where it cannot be compiled, MissingExtraError where llguidance is not installed.
        """
        wanted = params.structured_outputs
        return None if wanted is None else self._grammar_compiler.compile(wanted)

    def cancel(self, request: Request) -> None:
        """Stop a request, wherever it is; its slot and pages are free at once. A finished one is left as it is."""
        if not request.finished:
            request.cancelled = True
            if request.family is None:
                self.scheduler.remove(request)
            else:
                leave(request, request.family, self.scheduler)

    def reset(self) -> None:
        """Cancel every request and free all slots and pages, after a step that raised; what the prefix cache holds stays."""
        self.runner.reset([page for request in self.scheduler.clear() for page in request])

    def check(self, prompt: Sequence[int]) -> None:
        """Generate up to two tokens after a prompt of ids, to see that the engine works. Raises whatever a step raises, and
        NanohybridError where the model's logits are not numbers."""
        prompt = prompt[: max(1, self.scheduler.max_model_len - 2)]
        params = SamplingParams(max_tokens=max(1, min(2, self.scheduler.max_model_len - len(prompt))))
        request = self.add(prompt, params, salt="nanohybrid.check")
        while not request.finished:
            self.step()
        completed(request)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Callable[[int], object] | None = None,
    ) -> list[Completion]:
        """Complete all prompts, in their order, `n` completions each. `progress` is told how many more are finished.

        One `params` serves every prompt, its seed too: equal prompts then get equal texts; give a list for different ones.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(each)} sampling parameters")
        requests: list[Request] = []
        try:
            for prompt, wanted in zip(prompts, each, strict=True):
                requests += self.add_choices(prompt, wanted)
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

    @cached_property
    def _grammar_compiler(self) -> GrammarCompiler:
        vocab_size = self.model.config.vocab_size
        return GrammarCompiler(
            self.tokenizer, vocab_size, frozenset(token for token in self._eos if token < vocab_size)
        )

    def _schedule(self) -> list[Work]:
        work = self.scheduler.schedule()
        if self.scheduler.moves:
            self.runner.move(self.scheduler.moves)
            self.scheduler.moves.clear()
        return work

    def _postprocess(self, work: list[Work], ready: list[Request], sampled: Sampled) -> None:
        for request, start, length in work:
            request.computed = start + length - len(request.draft)
        if self.cache is not None:
            for request, _, _ in work:
                if request.stops and request.stops[-1] == request.computed:
                    self._checkpoint(request, self.cache)
        for request in ready:
            if request.family is not None:
                fork(request, request.family, self.scheduler, self.runner)
        self._accept(ready, sampled)

    def _verify(self, drafting: list[Request], drafter: Drafter) -> None:
        """Say the drafts as far as they are what would have been said; the states go back to there."""
        said = dict.fromkeys((request.id for request in drafting), 0)
        going, offset = drafting, 0
        while going := [
            r for r in going if not r.finished and len(r.draft) > offset and r.tokens[-1] == r.draft[offset]
        ]:
            offset += 1
            for request in going:
                request.computed += 1
                said[request.id] = offset
            self._accept(going, self.runner.sample_draft(going, offset))
        if drafting:
            self.runner.settle({r.id: 1 + said[r.id] for r in drafting if not r.finished})
        for request in drafting:
            drafter.learn(request, said[request.id])
            request.draft = []

    def _accept(self, ready: list[Request], sampled: Sampled) -> None:
        """Give each request its token; those that end with it, or that failed, give back what they hold."""
        tokens, logprobs, top = sampled.tokens, sampled.logprobs, sampled.top
        failed = {row: not_finite(len(ready[row].tokens)) for row in sampled.broken}
        for row, request in enumerate(ready):
            error = request.error or failed.get(row)
            finished = request.accept(
                tokens[row], None if logprobs is None else logprobs[row], None if top is None else top[row]
            )
            if row in failed and request.pages is not None:
                self.runner.scrub(request.pages.ids)
            if finished or error is not None:
                self.scheduler.remove(request)
            if error is not None:
                request.fail(error)

    def _checkpoint(self, request: Request, cache: PrefixCache) -> None:
        """Leave a copy of the state and of the pages here, unless there is one."""
        request.stops.pop()
        beginning = request.prompt[: request.computed]
        if request.slot and request.pages and not cache.holds(beginning, request.salt):
            saved = self.runner.save(request, request.slot.ids[0], request.pages.ids)
            cache.put(beginning, request.salt, saved, saved.parts)


def not_finite(tokens: int) -> GenerationError:
    """The error of a request whose logits after `tokens` written tokens were not numbers."""
    return GenerationError(
        "not_finite",
        f"the model's logits are not numbers after {tokens} tokens; was the checkpoint trained without diverging?",
    )


def completed(request: Request) -> Completion:
    """What came of a finished request. Raises NanohybridError where it failed."""
    completion = request.completion()
    if completion.error is not None:
        raise NanohybridError(completion.error.message)
    return completion
