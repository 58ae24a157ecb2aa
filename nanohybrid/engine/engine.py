"""The engine: requests in, tokens out. A step is schedule, run, postprocess.

    engine = Engine(model, tokenizer, max_num_seqs=8)
    completions = engine.generate(prompts, SamplingParams(max_tokens=64))

`generate` and `stream` are loops over `add`, `step` and `cancel`, from which a server makes its own.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from nanohybrid.engine.block_manager import PagePool, SlotPool
from nanohybrid.engine.config import EngineConfig
from nanohybrid.engine.parallel_sampling import choice_seed, detach, fork
from nanohybrid.engine.params import Completion, GenerationError, SamplingParams
from nanohybrid.engine.prefix_cache import PrefixCache, restore_prefix
from nanohybrid.engine.prompt_lookup import PromptLookupProposer
from nanohybrid.engine.request import Request
from nanohybrid.engine.runner import Runner
from nanohybrid.engine.sampler import Sampled
from nanohybrid.engine.scheduler import Scheduler, Work
from nanohybrid.engine.scoring import PromptScores
from nanohybrid.engine.step import Watchdog, run_step
from nanohybrid.engine.structured_output import Grammar, GrammarCompiler
from nanohybrid.errors import InputError, NanohybridError
from nanohybrid.model import HybridLM
from nanohybrid.model.spec import KV_DTYPES, STATE_DTYPES, known
from nanohybrid.ops.sizes import PAGE
from nanohybrid.text import Tokenizer


class Engine:
    """One model, one tokenizer, and the memory that `config` asks for, which is taken once.

    `options` are fields of EngineConfig by name, instead of or on top of `config`. Raises InputError for an
    option that does not exist or cannot be used.
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
        self.scheduler.report_freed = debug
        self.prefix_cache: PrefixCache | None = None
        if config.prefix_cache_bytes:
            self.prefix_cache = PrefixCache(config.prefix_cache_bytes, config.prefix_cache_interval)
            self.scheduler.on_admit = partial(restore_prefix, self.prefix_cache)
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
            self.runner.decoder.prefetch_enabled = not (
                config.overcommit or config.deterministic or speculate
            )
        self.proposer = PromptLookupProposer(speculate) if speculate else None
        if self.proposer is not None:
            self.scheduler.propose = self.proposer.propose
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

        prompts: ids. max_tokens: of the longest answer. n: answers of each prompt. Sequences are no longer
            than the model was made
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
        """Advance every running request. Returns those that got a token; some may be finished now."""
        with self.watchdog:
            if not (work := self._schedule()):
                return []
            work, (ready, sampled) = run_step(work, self.scheduler, self.runner, self._schedule)
            self._postprocess(work, ready, sampled)
            return ready

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stream: bool = False,
        cache_breakpoints: Sequence[int] = (),
        salt: str = "",
        grammar: Grammar | None = None,
    ) -> Request:
        """Queue one completion of a prompt of ids.

        stream: detokenize as tokens are written (`Request.take_text`). cache_breakpoints: after how many of
            its tokens another prompt is likely to differ (the end of system message and tools; just before
            the `<think>` of the generation prompt); the prefix cache saves its state there. salt: only
            prompts of the same salt share cached states. grammar: that of `params.structured_outputs`, from
            `compile_grammar`; compiled here where it is None.

        Raises InputError where the prompt and its answer are longer than `max_model_len`, where an id is out
        of range, and where the structured outputs cannot be compiled.
        """
        if params.n != 1:
            raise ValueError("a request is one completion: add_choices makes params.n of them")
        return self.add_choices(prompt, params, stream, cache_breakpoints, salt, grammar)[0]

    def add_choices(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stream: bool = False,
        cache_breakpoints: Sequence[int] = (),
        salt: str = "",
        grammar: Grammar | None = None,
    ) -> list[Request]:
        """Queue `params.n` completions of a prompt, which is computed once; each is a request of its own.

        The first has the seed of `params`; the others sample as separate requests with `choice_seed(seed,
        index)` would. The arguments and errors are those of `add`.
        """
        vocabulary = self.model.config.vocab_size
        if prompt and not 0 <= min(prompt) <= max(prompt) < vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise InputError(
                f"the prompt has the id {wrong}: ids of this model are from 0 to {vocabulary - 1}"
            )
        seed = secrets.randbits(64) if params.seed is None else params.seed
        if self.runner.deterministic:
            cache_breakpoints = [position // PAGE * PAGE for position in cache_breakpoints]
        alternatives = params.prompt_logprobs
        scores = None if alternatives is None else PromptScores(list(prompt), alternatives)
        grammar = self.compile_grammar(params) if grammar is None else grammar
        group = [
            Request(
                self._next_id + index,
                list(prompt),
                params,
                self.tokenizer,
                seed=choice_seed(seed, index),
                stop_ids=frozenset() if params.ignore_eos else self._eos,
                stream=stream,
                cache_breakpoints=tuple(cache_breakpoints),
                salt=salt,
                scores=scores,
                grammar=grammar,
            )
            for index in range(params.n)
        ]
        self.scheduler.add(group[0])
        self._next_id += params.n
        if params.n > 1:
            for request in group:
                request.group = group
            return list(group)
        return group

    def compile_grammar(self, params: SamplingParams) -> Grammar | None:
        """The compiled grammar of `params.structured_outputs`; None where there are none.

        May be called from any thread.

        Raises InputError where it cannot be compiled, MissingExtraError where llguidance is not installed.
        """
        wanted = params.structured_outputs
        return None if wanted is None else self._grammar_compiler.compile(wanted)

    def cancel(self, request: Request) -> None:
        """Stop a request, whether it waits or runs; its slot and pages are free at once.

        A finished one is left as it is.
        """
        if not request.finished:
            request.cancelled = True
            if request.group is None:
                self.scheduler.remove(request)
            else:
                detach(request, request.group, self.scheduler)

    def reset(self) -> None:
        """Cancel every request and free all slots and pages, after a step that raised.

        The prefix cache is kept.
        """
        self.runner.reset([page for pages in self.scheduler.clear() for page in pages])

    def check(self, prompt: Sequence[int]) -> None:
        """Generate up to two tokens after a prompt of ids, to see that the engine works.

        Raises what a step raises, and NanohybridError where the logits are not finite.
        """
        prompt = prompt[: max(1, self.scheduler.max_model_len - 2)]
        params = SamplingParams(max_tokens=max(1, min(2, self.scheduler.max_model_len - len(prompt))))
        request = self.add(prompt, params, salt="nanohybrid.check")
        while not request.finished:
            self.step()
        completed(request)

    @property
    def busy(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Callable[[int], object] | None = None,
    ) -> list[Completion]:
        """Complete prompts of ids: `n` completions of each, in the order of the prompts.

        params: one for all prompts, its seed included (equal prompts then get equal texts), or one for each.
        progress: is called with how many more completions are finished. Raises NanohybridError where a
            request fails.
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
        """Yield the text of one completion as it is written; closing the iterator cancels the request."""
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
        stop_ids = frozenset(token for token in self._eos if token < vocab_size)
        return GrammarCompiler(self.tokenizer, vocab_size, stop_ids)

    def _schedule(self) -> list[Work]:
        work = self.scheduler.schedule()
        if self.scheduler.swaps:
            self.runner.swap(self.scheduler.swaps)
            self.scheduler.swaps.clear()
        return work

    def _postprocess(self, work: list[Work], ready: list[Request], sampled: Sampled) -> None:
        """Record what was computed, save snapshots, give each request its token, and verify the drafts."""
        for request, start, length in work:
            request.num_computed_tokens = start + length - len(request.draft)
        if self.prefix_cache is not None:
            for request, _, _ in work:
                if request.breakpoints and request.breakpoints[-1] == request.num_computed_tokens:
                    self._save_snapshot(request, self.prefix_cache)
        for request in ready:
            if request.group is not None:
                fork(request, request.group, self.scheduler, self.runner)
        self._accept(ready, sampled)
        if self.proposer is not None:
            self._verify([request for request in ready if request.draft], self.proposer)

    def _verify(self, drafting: list[Request], proposer: PromptLookupProposer) -> None:
        """Accept each draft as far as it is what is sampled, and roll the state back to there."""
        accepted = dict.fromkeys((request.id for request in drafting), 0)
        going, offset = drafting, 0
        while going := [
            request
            for request in going
            if not request.finished
            and len(request.draft) > offset
            and request.tokens[-1] == request.draft[offset]
        ]:
            offset += 1
            for request in going:
                request.num_computed_tokens += 1
                accepted[request.id] = offset
            self._accept(going, self.runner.sample_draft(going, offset))
        if drafting:
            alive = [request for request in drafting if not request.finished]
            self.runner.commit({request.id: 1 + accepted[request.id] for request in alive})
        for request in drafting:
            proposer.update(request, accepted[request.id])
            request.draft = []

    def _accept(self, ready: list[Request], sampled: Sampled) -> None:
        """Give each request its token; those that end with it, or that failed, free what they hold."""
        tokens, logprobs, top = sampled.tokens, sampled.logprobs, sampled.top
        failed = {row: not_finite(len(ready[row].tokens)) for row in sampled.non_finite}
        for row, request in enumerate(ready):
            error = request.error or failed.get(row)
            finished = request.accept(
                tokens[row], None if logprobs is None else logprobs[row], None if top is None else top[row]
            )
            if row in failed and request.pages is not None:
                self.runner.zero_pages(request.pages.ids)
            if finished or error is not None:
                self.scheduler.remove(request)
            if error is not None:
                request.fail(error)

    def _save_snapshot(self, request: Request, cache: PrefixCache) -> None:
        """Save the state and pages of a request at its breakpoint, unless the cache has them."""
        request.breakpoints.pop()
        prefix = request.prompt[: request.num_computed_tokens]
        if request.slot and request.pages and not cache.contains(prefix, request.salt):
            saved = self.runner.save(request, request.slot.ids[0], request.pages.ids)
            cache.put(prefix, request.salt, saved, saved.parts)


def not_finite(tokens: int) -> GenerationError:
    """The error of a request whose logits after `tokens` written tokens are not finite."""
    return GenerationError(
        "not_finite",
        f"the model's logits are not numbers after {tokens} tokens; "
        "was the checkpoint trained without diverging?",
    )


def completed(request: Request) -> Completion:
    """The result of a finished request. Raises NanohybridError where it failed."""
    completion = request.completion()
    if completion.error is not None:
        raise NanohybridError(completion.error.message)
    return completion
