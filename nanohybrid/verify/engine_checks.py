"""Check that the engine's output does not depend on chunking, batching, caching, preemption and draft tokens.

The first four checks run the engine's deterministic mode and require equal bits. Draft tokens are computed
several at once, which rounds differently unless the executor is batch-invariant. So the last check compares
log-probabilities up to the first token that differs; two tokens with equal probability may differ.
"""

from collections.abc import Callable
from typing import Any

from nanohybrid.engine import Completion, Engine, SamplingParams
from nanohybrid.engine.random_weights import stand_in_tokenizer
from nanohybrid.engine.request import Request
from nanohybrid.errors import InputError
from nanohybrid.verify.model_under_test import LENGTH, ModelUnderTest
from nanohybrid.verify.result import TOLERANCE, CheckResult

ANSWER = 10
DRAWN = SamplingParams(max_tokens=ANSWER, ignore_eos=True, temperature=1.0, seed=1, logprobs=True)
GREEDY = SamplingParams(max_tokens=ANSWER, ignore_eos=True, logprobs=True)
DRAFTS = (3, 0, 2)  # correct draft tokens of each proposal in turn; a wrong one follows them


def chunked_request(subject: ModelUnderTest) -> CheckResult:
    """A prompt computed in chunks, under a small token budget, against the prompt computed at once."""
    found = _ask(_engine(subject, max_num_batched_tokens=1, max_num_seqs=1), _prompt(subject))
    return _exact(subject, "engine: chunked == whole", f"pieces of at most 129 of {LENGTH} tokens", found)


def batched_request(subject: ModelUnderTest) -> CheckResult:
    """A request in another slot, among requests that start before and after it."""
    engine = _engine(subject, max_num_seqs=3)
    engine.add(_prompt(subject)[5:40], DRAWN)
    for _ in range(2):
        engine.step()
    request = engine.add(_prompt(subject), DRAWN)
    engine.add(_prompt(subject)[40:90], DRAWN)
    return _exact(subject, "engine: batched == alone", "3 requests, one slot each", _finish(engine, request))


def cached_request(subject: ModelUnderTest) -> CheckResult:
    """A request that resumes from a cached state of an earlier request with the same prompt."""
    engine = _engine(subject, prefix_cache_bytes=2**40, prefix_cache_interval=128)
    _ask(engine, _prompt(subject))
    found = _ask(engine, _prompt(subject))
    if not found.cached_tokens:
        return CheckResult("engine: cached == computed", "nothing was found in the cache", float("inf"), 0.0)
    return _exact(
        subject, "engine: cached == computed", f"{found.cached_tokens} of {LENGTH} tokens cached", found
    )


def preempted_request(subject: ModelUnderTest) -> CheckResult:
    """A request that is preempted to host memory at every third step, while another request uses its slot."""
    engine = _engine(subject, max_num_seqs=2)
    engine.add(_prompt(subject)[7:20], DRAWN)
    request = engine.add(_prompt(subject), DRAWN)

    def disturb(step: int) -> None:
        if step % 3 == 0 and request.slot is not None:
            engine.scheduler.preempt(request)

    found = _finish(engine, request, disturb)
    return _exact(
        subject, "engine: preempted == not", f"preempted {engine.scheduler.num_preemptions} times", found
    )


def drafted_request(subject: ModelUnderTest) -> CheckResult:
    """Correct and wrong draft tokens, verified together; rejected ones are rolled back.

    The engine must refuse a model with layers that cannot roll draft tokens back.
    """
    config = subject.model.config
    if not all(mixer.takes_drafts(config) for mixer in config.mixers):
        return _refused(subject)
    wanted = _ask(_engine(subject, deterministic=False), _prompt(subject), GREEDY)
    engine = _engine(subject, deterministic=False, num_speculative_tokens=4)
    asked: list[int] = []

    def propose(request: Request, limit: int) -> list[int]:
        said = len(request.tokens)
        right = wanted.token_ids[said : said + DRAFTS[len(asked) % len(DRAFTS)]]
        asked.append(said)
        after = wanted.token_ids[said + len(right)] if said + len(right) < ANSWER else 0
        return [*right, (after + 1) % subject.model.config.vocab_size][:limit]

    engine.scheduler.propose = propose
    found = _ask(engine, _prompt(subject), GREEDY)
    proposer = engine.proposer
    on = (
        f"{proposer.num_accepted_tokens} of {proposer.num_draft_tokens} draft tokens right"
        if proposer
        else ""
    )
    exact = engine.runner.executor.is_batch_invariant
    tolerance = 0.0 if exact else TOLERANCE[subject.model.dtype]
    return CheckResult("engine: drafted == plain", on, _distance(found, wanted), tolerance)


def _refused(subject: ModelUnderTest) -> CheckResult:
    what = "engine: drafted == plain"
    try:
        _engine(subject, deterministic=False, num_speculative_tokens=4)
    except InputError:
        return CheckResult(what, "refused: a layer cannot roll back", 0.0, 0.0)
    return CheckResult(what, "not refused, though a layer cannot roll back", float("inf"), 0.0)


def _engine(
    subject: ModelUnderTest, max_num_seqs: int = 1, deterministic: bool = True, **options: Any
) -> Engine:
    tokenizer = stand_in_tokenizer(subject.model.config)
    return Engine(
        subject.model,
        tokenizer,
        max_num_seqs=max_num_seqs,
        max_model_len=LENGTH + ANSWER,
        deterministic=deterministic,
        **options,
    )


def _prompt(subject: ModelUnderTest) -> list[int]:
    return [int(token) for token in subject.text]


def _ask(engine: Engine, prompt: list[int], params: SamplingParams = DRAWN) -> Completion:
    return _finish(engine, engine.add(prompt, params))


def _finish(
    engine: Engine, request: Request, disturb: Callable[[int], None] = lambda step: None
) -> Completion:
    step = 0
    while not request.finished:
        engine.step()
        step += 1
        if not request.finished:
            disturb(step)
    return request.completion()


def _exact(subject: ModelUnderTest, what: str, on: str, found: Completion) -> CheckResult:
    alone = subject.memoize("engine alone", lambda: _ask(_engine(subject), _prompt(subject)))
    return CheckResult(
        what, on, _distance(found, alone) if found.token_ids == alone.token_ids else float("inf"), 0.0
    )


def _distance(found: Completion, wanted: Completion) -> float:
    """Largest difference of log-probabilities up to the first different token, relative to the largest one.

    NaN if either request ended with an error.
    """
    if "error" in (found.finish_reason, wanted.finish_reason):
        return float("nan")
    same = next(
        (i for i, (a, b) in enumerate(zip(found.token_ids, wanted.token_ids, strict=True)) if a != b),
        ANSWER - 1,
    )
    pairs = list(zip(found.logprobs or [], wanted.logprobs or [], strict=True))[: same + 1]
    return max(abs(a - b) for a, b in pairs) / max(max(abs(b) for _, b in pairs), 1.0)
