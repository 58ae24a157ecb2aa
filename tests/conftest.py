"""What all tests share: few threads, quick property tests, and uninitialized memory that cannot pass for
zeros.
"""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: a second thread in each would only take turns
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fcntl
import signal
from contextlib import ExitStack, contextmanager

sys.path.insert(0, str(Path(__file__).parent))  # for configurations.py

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# A shell starts background jobs with SIGINT ignored, and processes inherit that. Tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
with torch.device("meta"):
    torch.empty(
        1
    )  # torch now remembers its true creators; else "meta" would mean nothing to the poisoned ones


def pytest_configure(config):
    """The default suite is the CPU's, also where there is a GPU: commands take one by themselves, and numbers
    of both are not compared.
    """
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "TRITON_INTERPRET", "1"
        )  # before Triton is first imported: kernels are then Python, on the CPU


def poisoned(create):
    """A creator of uninitialized tensors whose floating-point ones hold NaN, so that a read of unwritten
    memory shows.
    """

    def create_poisoned(*args, **kwargs):
        tensor = create(*args, **kwargs)
        if tensor.is_floating_point() and not tensor.is_meta:
            with (
                torch.no_grad()
            ):  # torch 2.11 makes leaves that require gradients this way when it recomputes activations
                tensor.fill_(float("nan"))
        return tensor

    return create_poisoned


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """In every test torch.empty and its kin hand out NaN instead of whatever the memory held."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty",):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """A test marked `gpu` is skipped, with the reason, where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@contextmanager
def locked(path, mode):
    """Hold a lock on a file that exists (its content does not matter) in `mode`, fcntl.LOCK_SH or LOCK_EX."""
    with open(path) as file:
        fcntl.flock(file, mode)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may still hold the file open


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """In a parallel run a test marked `alone` begins when no other test runs, and no other begins before it
    ends.

    Tests hold one lock while they run, shared or alone. Each takes it behind a second lock, so that no new
    test begins while one waits to be alone."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    folder, alone = Path(__file__).parent, "alone" in item.keywords
    with ExitStack() as running:
        with locked(folder / "conftest.py", fcntl.LOCK_EX):
            running.enter_context(
                locked(folder.parent / "pyproject.toml", fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            )
        return (yield)
