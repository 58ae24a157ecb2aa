"""`choose`: which form of an op runs."""

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
    """A tensor that reports a CUDA device."""

    is_cuda = True


KERNELS = {"numba": Kernel(f"{__name__}:loops"), "triton": Kernel(f"{__name__}:kernel")}
CPU, CUDA = torch.ones(1), torch.ones(1).as_subclass(OnCuda)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Makes this file's functions importable under its name, as an op's kernels are."""
    import sys
    import types

    module = types.ModuleType(__name__)
    module.loops, module.kernel = loops, kernel
    monkeypatch.setitem(sys.modules, __name__, module)


def run(*tensors, **kernels):
    return choose(*tensors, reference=an_equation, torch=plain, **kernels)()


def test_choose_refuses_an_unknown_form(monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "fast")
    with pytest.raises(
        ValueError, match=r"NANOHYBRID_KERNELS is 'fast': known are reference, torch, numba, triton"
    ):
        call()


@pytest.mark.parametrize("form, module", [("reference", reference), ("torch", torch_form)])
def test_choose_runs_the_form_of_the_environment(form, module, monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", form)
    monkeypatch.setattr(module, "ssd_scan", lambda *arguments: "chosen")
    assert ssd_scan(torch.zeros(1, 1, 1), *[None] * 5, Layout.packed([1])) == "chosen"


@pytest.mark.parametrize("form", ["", "reference", "torch", "numba", "triton"])
@pytest.mark.parametrize("tensor, default", [(CPU, "numba"), (CUDA, "triton")], ids=["cpu", "cuda"])
def test_choose_selects_by_device_unless_a_form_is_forced(tensor, default, form, monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", form)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    impossible = tensor is CUDA and form == "numba"
    assert run(tensor, **KERNELS) == ("torch" if impossible else form or default)


@pytest.mark.parametrize("form", ["", "numba", "triton"])
@pytest.mark.parametrize("tensor", [CPU, CUDA], ids=["cpu", "cuda"])
def test_choose_falls_back_to_the_torch_form(tensor, form, monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", form)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run(tensor) == "torch"


def test_choose_refuses_triton_on_a_cpu_without_its_interpreter(monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        run(CPU, **KERNELS)


@pytest.mark.parametrize("tensor", [CPU, CUDA], ids=["cpu", "cuda"])
def test_choose_skips_a_kernel_without_gradients_where_one_is_needed(tensor):
    wanted = tensor.clone().requires_grad_()
    assert run(tensor, wanted, **KERNELS) == "torch"
    with torch.no_grad():
        assert run(tensor, wanted, **KERNELS) != "torch"
    through = {name: Kernel(kernel.path, gradients=True) for name, kernel in KERNELS.items()}
    assert run(tensor, wanted, **through) != "torch"


@pytest.mark.parametrize("tensor", [CPU, CUDA], ids=["cpu", "cuda"])
def test_choose_runs_float64_in_torch(tensor):
    assert run(tensor.double(), **KERNELS) == "torch"
