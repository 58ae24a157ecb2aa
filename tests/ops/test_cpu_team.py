"""The CPU's team of threads: every turn is run by all of them, whether they wait awake or sleep, and a process ends beside them."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from nanohybrid.ops.numba import available

if not available():
    pytest.skip("numba is not installed", allow_module_level=True)

from nanohybrid.executors.cpu.kernels import gemm as linear
from nanohybrid.executors.cpu.kernels import packing as packed
from nanohybrid.ops.numba import pointwise
from nanohybrid.ops.numba import threads as team

COUNT = 20_000


def squares(soon):
    """One kernel without meetings on a new array; whether all threads did their part."""
    x, y = torch.randn(COUNT), torch.full((COUNT,), float("nan"))
    team.run(pointwise.relu2_forward, COUNT, x.numpy(), y.numpy(), False, size=team.threads(0), soon=soon)
    return torch.equal(y, x.relu().square())


@pytest.fixture(params=[1, 2, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(team, "threads", lambda _: request.param)
    return request.param


def test_turns_follow_each_other_awake_and_asleep(threads):
    for turn in range(300):
        assert squares(soon=turn % 3 > 0)
        if turn % 60 == 0:
            time.sleep(0.03)  # longer than they wait awake


def test_threads_that_sleep_a_moment_too_early_are_woken(threads, monkeypatch):
    monkeypatch.setattr(team, "SOON", 1)
    assert all(squares(soon=True) for _ in range(500))


def test_callers_wait_for_each_other(threads):
    weight = packed.pack(torch.randn(130, 64, dtype=torch.bfloat16))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    expected, wrong = packed.matmul(x, weight), []

    def call():
        wrong.extend(
            i
            for i in range(50)
            if not (torch.equal(packed.matmul(x, weight), expected) and squares(soon=True))
        )

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_call_is_words():
    assert [team._word(7), team._word(True), team._word(1.5)] == [7, 1, 0x3FF8000000000000]
    numbers = torch.arange(3).numpy()
    assert team._word(numbers) == numbers.ctypes.data
    assert linear.matmul.address == linear.matmul.address != 0


def test_a_process_ends_while_its_threads_wait_for_more():
    script = """
import torch
from nanohybrid.ops.numba import pointwise
from nanohybrid.ops.numba import threads as team
team.threads = lambda _: 3
team.SOON = 10**12
x = torch.ones(9000)
team.run(pointwise.relu2_forward, 9000, x.numpy(), x.numpy(), False, size=team.threads(0), soon=True)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("units", [1, 2, 5, 40])
def test_every_output_is_somebodys_whoever_is_slow(threads, units):
    """Shares of one unit and of many; a thread that finds its own empty takes from the others'."""
    weight = packed.pack(torch.randn(units * packed.UNIT - 3, 96, dtype=torch.bfloat16))
    x = torch.randn(7, 96, dtype=torch.bfloat16)
    expected = x.double() @ packed.unpack(weight).double().T
    for _ in range(60):
        found = packed.matmul(x, weight, torch.float32)
        assert torch.allclose(found.double(), expected, atol=1e-3)
