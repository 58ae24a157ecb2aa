"""All proofs, in the order in which a failure of one explains those after it."""

from collections.abc import Callable, Iterator

from nanohybrid.model import HybridLM
from nanohybrid.verify.cutting import batch_is_alone, chunked_is_whole, packed_is_unpacked, step_is_whole
from nanohybrid.verify.line import Line
from nanohybrid.verify.resuming import resumed_is_uninterrupted
from nanohybrid.verify.saving import saved_is_loaded
from nanohybrid.verify.serving import (
    batched_says_what_it_says_alone,
    cached_says_what_was_computed,
    chunked_says_the_whole,
    drafted_says_what_is_said_token_by_token,
    put_aside_says_what_it_would_have,
)
from nanohybrid.verify.subject import Subject

PROOFS: tuple[Callable[[Subject], Line], ...] = (
    packed_is_unpacked,
    chunked_is_whole,
    step_is_whole,
    batch_is_alone,
    chunked_says_the_whole,
    batched_says_what_it_says_alone,
    cached_says_what_was_computed,
    put_aside_says_what_it_would_have,
    drafted_says_what_is_said_token_by_token,
    saved_is_loaded,
    resumed_is_uninterrupted,
)


def verify(model: HybridLM, seed: int = 0) -> Iterator[Line]:
    """Run every proof on `model`, one line after another. Needs one copy of the weights."""
    subject = Subject(model, seed)
    for proof in PROOFS:
        yield proof(subject)
