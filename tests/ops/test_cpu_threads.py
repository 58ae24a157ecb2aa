"""The kernels' thread pool: every launch runs on all threads, whether they spin or sleep, and the process can
exit.
"""

import subprocess
import sys
import threading
import time

import pytest
import torch

from nanohybrid.ops.numba import available

if not available():
    pytest.skip("numba is not installed", allow_module_level=True)

from nanohybrid.executors.cpu.kernels import gemm, packing
from nanohybrid.ops.numba import pointwise, threads

COUNT = 20_000


def squares(keep_spinning):
    """Run a kernel without barriers on a new array; whether all threads did their part."""
    x, y = torch.randn(COUNT), torch.full((COUNT,), float("nan"))
    args = (COUNT, x.numpy(), y.numpy(), False)
    threads.run(pointwise.relu2_forward, *args, size=threads.num_threads(0), keep_spinning=keep_spinning)
    return torch.equal(y, x.relu().square())


@pytest.fixture(params=[1, 2, 3])
def num_threads(request, monkeypatch):
    monkeypatch.setattr(threads, "num_threads", lambda _: request.param)
    return request.param


def test_run_launches_on_spinning_and_on_sleeping_threads(num_threads):
    for launch in range(300):
        assert squares(keep_spinning=launch % 3 > 0)
        if launch % 60 == 0:
            time.sleep(0.03)  # longer than workers spin


def test_run_wakes_threads_that_fall_asleep_during_the_launch(num_threads, monkeypatch):
    monkeypatch.setattr(threads, "SPINS_BEFORE_SLEEP", 1)
    assert all(squares(keep_spinning=True) for _ in range(500))


def test_run_serializes_concurrent_callers(num_threads):
    weight = packing.pack(torch.randn(130, 64, dtype=torch.bfloat16))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    expected, wrong = packing.matmul(x, weight), []

    def call():
        wrong.extend(
            i
            for i in range(50)
            if not (torch.equal(packing.matmul(x, weight), expected) and squares(keep_spinning=True))
        )

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_run_passes_integers_floats_and_arrays_as_words():
    assert [threads._as_word(7), threads._as_word(True), threads._as_word(1.5)] == [7, 1, 0x3FF8000000000000]
    numbers = torch.arange(3).numpy()
    assert threads._as_word(numbers) == numbers.ctypes.data
    assert gemm.matmul.address == gemm.matmul.address != 0


def test_process_exits_while_its_workers_spin():
    script = """
import torch
from nanohybrid.ops.numba import pointwise, threads
threads.SPINS_BEFORE_SLEEP = 10**12
x = torch.ones(9000)
threads.run(pointwise.relu2_forward, 9000, x.numpy(), x.numpy(), False, size=3, keep_spinning=True)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("units", [1, 2, 5, 40])
def test_work_stealing_computes_every_output(num_threads, units):
    """Partitions of no unit, of one and of many: a thread whose own partition is empty steals from the
    others.
    """
    weight = packing.pack(torch.randn(units * packing.UNIT - 3, 96, dtype=torch.bfloat16))
    x = torch.randn(7, 96, dtype=torch.bfloat16)
    expected = x.double() @ packing.unpack(weight).double().T
    for _ in range(60):
        found = packing.matmul(x, weight, torch.float32)
        assert torch.allclose(found.double(), expected, atol=1e-3)
