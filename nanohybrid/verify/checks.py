"""All checks, in the order in which the failure of one explains those after it."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from nanohybrid.model import HybridLM
from nanohybrid.verify.checkpoint_check import saved_equals_loaded
from nanohybrid.verify.engine_checks import (
    batched_request,
    cached_request,
    chunked_request,
    drafted_request,
    preempted_request,
)
from nanohybrid.verify.executor_checks import (
    TEXTS,
    batch_equals_alone,
    chunked_equals_whole,
    packed_equals_unpacked,
    step_equals_whole,
    whole_equals_plain,
)
from nanohybrid.verify.model_under_test import (
    ExecutorUnderTest,
    ModelUnderTest,
    executors_of,
    packed_executor,
)
from nanohybrid.verify.result import CheckResult
from nanohybrid.verify.resume_check import resumed_equals_uninterrupted

EXECUTOR_CHECKS: tuple[Callable[[ExecutorUnderTest], CheckResult], ...] = (
    whole_equals_plain,
    chunked_equals_whole,
    step_equals_whole,
    batch_equals_alone,
)
ENGINE_CHECKS: tuple[Callable[[ModelUnderTest], CheckResult], ...] = (
    chunked_request,
    batched_request,
    cached_request,
    preempted_request,
    drafted_request,
)


def verify(model: HybridLM, seed: int = 0) -> Iterator[CheckResult]:
    """Run every check on `model`, one result after another, on every executor that this machine has for it.

    Needs one copy of the weights. Where the CPU kernels can run the model it is packed for them in place,
    last of all.
    """
    subject = ModelUnderTest(model, seed)
    yield packed_equals_unpacked(subject)
    executors = executors_of(subject)
    for executor in executors:
        yield from (check(executor) for check in EXECUTOR_CHECKS)
    yield from _engine(subject, executors[-1].name)  # the engine takes the last: graphs where they apply
    yield saved_equals_loaded(subject)
    yield resumed_equals_uninterrupted(subject)
    for text in TEXTS:  # the references of the plain forward, before the weights are packed
        subject.read_alone(*text)
    _ = subject.reference, subject.memoryless
    if (packed := packed_executor(subject)) is not None:
        yield from (check(packed) for check in EXECUTOR_CHECKS)
        yield from _engine(subject, packed.name)


def _engine(subject: ModelUnderTest, executor: str) -> Iterator[CheckResult]:
    """The engine's checks, named after the executor that it uses."""
    subject.forget("engine alone")
    for check in ENGINE_CHECKS:
        result = check(subject)
        yield replace(result, what=f"{executor} {result.what}")
