"""Whatever the engine does with a request, it says the same: cut, batched, cached and put aside bit for bit, drafted up to rounding.

The first four run the engine's deterministic mode, whose claim they are. Drafts compute several tokens at once, which rounds
otherwise: there log-probabilities are compared up to the first token that differs, and two that tie may.
"""

from collections.abc import Callable
from typing import Any

from nanohybrid.engine import Completion, Engine, SamplingParams
from nanohybrid.engine.random_weights import stand_in_tokenizer
from nanohybrid.engine.request import Request
from nanohybrid.verify.line import TOLERANCE, Line
from nanohybrid.verify.subject import LENGTH, Subject

ANSWER = 10
DRAWN = SamplingParams(max_tokens=ANSWER, ignore_eos=True, temperature=1.0, seed=1, logprobs=True)
GREEDY = SamplingParams(max_tokens=ANSWER, ignore_eos=True, logprobs=True)
DRAFTS = (3, 0, 2)  # so many right ones, and a wrong one behind them, in turn


def chunked_says_the_whole(subject: Subject) -> Line:
    """A prompt computed in the pieces that a small budget allows."""
    found = _ask(_engine(subject, max_num_batched_tokens=1, max_num_seqs=1), _prompt(subject))
    return _exact(subject, "engine: chunked == whole", f"pieces of at most 129 of {LENGTH} tokens", found)


def batched_says_what_it_says_alone(subject: Subject) -> Line:
    """Among others that begin before and after it, in another slot."""
    engine = _engine(subject, max_num_seqs=3)
    engine.add(_prompt(subject)[5:40], DRAWN)
    for _ in range(2):
        engine.step()
    request = engine.add(_prompt(subject), DRAWN)
    engine.add(_prompt(subject)[40:90], DRAWN)
    return _exact(subject, "engine: batched == alone", "3 requests, one slot each", _finish(engine, request))


def cached_says_what_was_computed(subject: Subject) -> Line:
    """From a checkpoint that an earlier request of the same prompt left."""
    engine = _engine(subject, prefix_cache_bytes=2**40, prefix_cache_interval=128)
    _ask(engine, _prompt(subject))
    found = _ask(engine, _prompt(subject))
    if not found.cached_tokens:
        return Line("engine: cached == computed", "nothing was found in the cache", float("inf"), 0.0)
    return _exact(
        subject, "engine: cached == computed", f"{found.cached_tokens} of {LENGTH} tokens cached", found
    )


def put_aside_says_what_it_would_have(subject: Subject) -> Line:
    """Put aside in host memory after every third token, its slot given to another meanwhile."""
    engine = _engine(subject, max_num_seqs=2)
    engine.add(_prompt(subject)[7:20], DRAWN)
    request = engine.add(_prompt(subject), DRAWN)

    def disturb(step: int) -> None:
        if step % 3 == 0 and request.slot is not None:
            engine.scheduler.preempt(request)

    found = _finish(engine, request, disturb)
    return _exact(
        subject, "engine: preempted == not", f"put aside {engine.scheduler.num_preemptions} times", found
    )


def drafted_says_what_is_said_token_by_token(subject: Subject) -> Line:
    """Drafts right and wrong, verified several tokens at once; states taken back."""
    wanted = _ask(_engine(subject, deterministic=False), _prompt(subject), GREEDY)
    engine = _engine(subject, deterministic=False, num_speculative_tokens=4)
    asked: list[int] = []

    def propose(request: Request, room: int) -> list[int]:
        said = len(request.tokens)
        right = wanted.token_ids[said : said + DRAFTS[len(asked) % len(DRAFTS)]]
        asked.append(said)
        after = wanted.token_ids[said + len(right)] if said + len(right) < ANSWER else 0
        return [*right, (after + 1) % subject.model.config.vocab_size][:room]

    engine.scheduler.propose = propose
    found = _ask(engine, _prompt(subject), GREEDY)
    proposer = engine.proposer
    on = f"{proposer.num_accepted_tokens} of {proposer.num_draft_tokens} drafts right" if proposer else ""
    return Line("engine: drafted == plain", on, _distance(found, wanted), TOLERANCE[subject.model.dtype])


def _engine(subject: Subject, max_num_seqs: int = 1, deterministic: bool = True, **options: Any) -> Engine:
    tokenizer = stand_in_tokenizer(subject.model.config)
    return Engine(
        subject.model,
        tokenizer,
        max_num_seqs=max_num_seqs,
        max_model_len=LENGTH + ANSWER,
        deterministic=deterministic,
        **options,
    )


def _prompt(subject: Subject) -> list[int]:
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


def _exact(subject: Subject, what: str, on: str, found: Completion) -> Line:
    alone = subject.remembered("alone", lambda: _ask(_engine(subject), _prompt(subject)))
    return Line(
        what, on, _distance(found, alone) if found.token_ids == alone.token_ids else float("inf"), 0.0
    )


def _distance(found: Completion, wanted: Completion) -> float:
    """The largest difference of a log-probability up to the first other token, relative to the largest; NaN where either broke."""
    if "error" in (found.finish_reason, wanted.finish_reason):
        return float("nan")
    same = next(
        (i for i, (a, b) in enumerate(zip(found.token_ids, wanted.token_ids, strict=True)) if a != b),
        ANSWER - 1,
    )
    pairs = list(zip(found.logprobs or [], wanted.logprobs or [], strict=True))[: same + 1]
    return max(abs(a - b) for a, b in pairs) / max(max(abs(b) for _, b in pairs), 1.0)
