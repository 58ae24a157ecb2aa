"""Which form of an op runs."""

import pytest
import torch

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.gated_norm import gated_norm
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import reference, ssd_scan
from nanohybrid.ops.ssd_scan import torch as torch_form


def call():
    return gated_norm(torch.randn(2, 4), torch.randn(2, 4), torch.ones(4), 2, 1e-5)


def an_equation():
    return "reference"


def plain():
    return "torch"


def loops():
    return "numba"


def kernel():
    return "triton"


class OnCuda(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


KERNELS = {"numba": Kernel(f"{__name__}:loops"), "triton": Kernel(f"{__name__}:kernel")}
CPU, CUDA = torch.ones(1), torch.ones(1).as_subclass(OnCuda)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This file's functions are found under its name, as a room's kernels are."""
    import sys
    import types

    module = types.ModuleType(__name__)
    module.loops, module.kernel = loops, kernel
    monkeypatch.setitem(sys.modules, __name__, module)


def run(*tensors, **kernels):
    return choose(*tensors, reference=an_equation, torch=plain, **kernels)()


def test_an_unknown_form_is_an_error(monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "fast")
    with pytest.raises(
        ValueError, match=r"NANOHYBRID_KERNELS is 'fast': known are reference, torch, numba, triton"
    ):
        call()


@pytest.mark.parametrize("form, module", [("reference", reference), ("torch", torch_form)])
def test_a_form_can_be_forced(form, module, monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", form)
    monkeypatch.setattr(module, "ssd_scan", lambda *arguments: "chosen")
    assert ssd_scan(torch.zeros(1, 1, 1), *[None] * 5, Layout.packed([1])) == "chosen"


@pytest.mark.parametrize("form", ["", "reference", "torch", "numba", "triton"])
@pytest.mark.parametrize("tensor, default", [(CPU, "numba"), (CUDA, "triton")], ids=["cpu", "cuda"])
def test_the_device_chooses_unless_a_form_is_forced(tensor, default, form, monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", form)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    impossible = tensor is CUDA and form == "numba"
    assert run(tensor, **KERNELS) == ("torch" if impossible else form or default)


@pytest.mark.parametrize("form", ["", "numba", "triton"])
@pytest.mark.parametrize("tensor", [CPU, CUDA], ids=["cpu", "cuda"])
def test_an_op_without_the_form_runs_its_torch_form(tensor, form, monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", form)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run(tensor) == "torch"


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        run(CPU, **KERNELS)


@pytest.mark.parametrize("tensor", [CPU, CUDA], ids=["cpu", "cuda"])
def test_a_kernel_without_gradients_is_passed_over_where_one_is_wanted(tensor):
    wanted = tensor.clone().requires_grad_()
    assert run(tensor, wanted, **KERNELS) == "torch"
    with torch.no_grad():
        assert run(tensor, wanted, **KERNELS) != "torch"
    through = {name: Kernel(kernel.path, gradients=True) for name, kernel in KERNELS.items()}
    assert run(tensor, wanted, **through) != "torch"


@pytest.mark.parametrize("tensor", [CPU, CUDA], ids=["cpu", "cuda"])
def test_float64_is_left_to_torch(tensor):
    assert run(tensor.double(), **KERNELS) == "torch"
